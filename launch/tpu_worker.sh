#!/usr/bin/env bash
# What launch/train_tpu_vm.sh runs on the workers of a TPU.
#
#   bash launch/tpu_worker.sh stop                     end the training that runs here; it saves first
#   bash launch/tpu_worker.sh follow RUN COMMAND...    start COMMAND, unless RUN is started already; show its output
#
# The status is the command's; 70 in the place of 1, which is gcloud's for a lost connection; 75 when the training was
# told to stop, as when the machine is taken away; 76 when another launch has taken over.
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

# await FILE: up to ten seconds.
await() {
  local _
  for _ in {1..200}; do
    [ ! -s "$1" ] || return 0
    sleep 0.05
  done
  return 1
}

stop() {
  local pid
  pid=$(cat runs/worker/*/pid 2>/dev/null) || return 0
  rm -f runs/worker/*/current
  grep -qsa djepa_jax.main "/proc/$pid/cmdline" || return 0 # the number is another program's by now
  echo "worker $(hostname): stopping the training that runs here"
  kill -TERM "$pid" 2>/dev/null || return 0
  timeout 300 tail -s 0.2 --pid="$pid" -f /dev/null || kill -KILL "$pid"
}

# gcloud repeats a command whose connection was lost: that must not start it again.
follow() {
  local folder="runs/worker/$1" lines=20 status
  if [ ! -d "$folder" ]; then
    rm -rf runs/worker
    mkdir -p "$folder"
    touch "$folder/current"
    lines=+1
    # shellcheck disable=SC2016 # a shell and a session of its own, which outlive the connection
    setsid --fork bash -c '"${@:2}" & echo $! >"$1/pid"; wait $!; echo $? >"$1/status"' - "$folder" "${@:2}" \
      >"$folder/log" 2>&1 </dev/null
  fi
  await "$folder/pid" || die "worker $(hostname): the training did not start"
  tail -n "$lines" -s 0.2 --pid="$(cat "$folder/pid")" -f "$folder/log"
  [ -f "$folder/current" ] || exit 76
  await "$folder/status" || echo 143 >"$folder/status" # this machine was stopped and started
  status=$(cat "$folder/status")
  [ "$status" != 1 ] || status=70
  # The program ends with 0 after SIGTERM, too; 143: before it could handle that.
  [ "$status" != 0 ] || ! tail -n 5 "$folder/log" | grep -q "^stopped at step " || status=75
  [ "$status" != 143 ] || status=75
  exit "$status"
}

"$@"
