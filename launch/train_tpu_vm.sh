#!/usr/bin/env bash
# Train on a Cloud TPU, from a workstation with gcloud: ask for the TPU, wait for it, copy the committed state of this
# repository to all its workers, install, train; and begin again from the last checkpoint when a spot TPU was taken away.
#
#   bash launch/train_tpu_vm.sh --name=NAME --zone=ZONE --accelerator_type=TYPE --config=FILE --workdir=gs://BUCKET/DIR
#       [--cache=gs://BUCKET/CACHE] [--autoencoder=gs://BUCKET/kl16.ckpt] [--config_json=FILE in the place of --config]
#       [--project=ID] [--runtime_version=IMAGE] [--spot] [--max_restarts=100] [--poll_seconds=30] [--dry_run]
#       [--config.KEY=VALUE ...] [-- more flags for djepa_jax.main]
#   bash launch/train_tpu_vm.sh --name=djepa --zone=us-east5-b --accelerator_type=v6e-16 --spot \
#       --config=configs/djepa_l.py --workdir=gs://my-bucket/djepa_l --cache=gs://my-bucket/latents \
#       --autoencoder=gs://my-bucket/kl16.ckpt --config.batch_size=1024
#
# --cache and --autoencoder become --config.data.path and --config.autoencoder.path. Every worker copies them to its disk
# when the training starts (the latents of ImageNet: 42 GB, into ~/.cache; --config.data.staging=DIR names another folder),
# and again on a TPU that replaces one that was taken away. launch/prepare_imagenet.sh --publish puts a cache there.
#
# The status is the program's, or not 0 when --max_restarts is used up. The training outlives a lost connection and
# Ctrl-C here; the same command stops it, once it has saved, and goes on with the repository as it is then. The TPU is
# never deleted, except to replace one that is gone: the command that deletes it is printed at the end. For several
# workers gcloud wants its key in the agent: ssh-add ~/.ssh/google_compute_engine
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

# ---- On a worker: --on_worker=stop, and --on_worker=RUN -- COMMAND... -----------------------------------------------

notes=runs/worker # run, pid, status and log of the training on this worker

# await FILE: up to ten seconds.
await() {
  local _
  for _ in {1..100}; do
    [ ! -f "$1" ] || return 0
    sleep 0.1
  done
  return 1
}

# Ends the training that runs here; it saves first.
stop_training() {
  local pid _
  rm -f "$notes/run"
  pid=$(cat "$notes/pid" 2>/dev/null) || return 0
  grep -qsa djepa_jax.main "/proc/$pid/cmdline" || return 0
  echo "worker $(hostname): stopping the training that runs here"
  kill -TERM "$pid" 2>/dev/null || return 0
  for _ in {1..300}; do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 1
  done
  kill -KILL "$pid" 2>/dev/null || return 0
}

# follow_training RUN COMMAND...: start it unless this RUN is started already; show its output; exit with its status.
# gcloud itself repeats a command whose connection was lost.
follow_training() {
  local run=$1 lines=20 pid status
  shift
  if [ "$(cat "$notes/run" 2>/dev/null)" != "$run" ]; then
    stop_training
    mkdir -p "$notes"
    rm -f "$notes/pid" "$notes"/status-*
    echo "$run" >"$notes/run"
    lines=+1
    # shellcheck disable=SC2016 # a shell and a session of its own, which outlive the connection
    setsid --fork bash -c '
      notes=$1; run=$2; shift 2
      "$@" & echo $! >"$notes/pid.new"; mv "$notes/pid.new" "$notes/pid"
      status=0; wait $! || status=$?
      echo "$status" >"$notes/status.new"; mv "$notes/status.new" "$notes/status-$run"
    ' supervisor "$notes" "$run" "$@" >"$notes/log" 2>&1 </dev/null
  fi
  await "$notes/pid" || die "worker $(hostname): the training did not start"
  pid=$(cat "$notes/pid")
  tail -n "$lines" --sleep-interval=0.2 --pid="$pid" -f "$notes/log"
  if [ "$(cat "$notes/run" 2>/dev/null)" != "$run" ]; then
    die "worker $(hostname): another launch has taken over"
  elif ! await "$notes/status-$run"; then
    echo "worker $(hostname): the training was cut off"
    exit 1
  fi
  status=$(cat "$notes/status-$run")
  # The program exits with 0 after SIGTERM too, as when the machine is taken away; 143: before it could handle that.
  if [ "$status" = 143 ] || { [ "$status" = 0 ] && tail -n 5 "$notes/log" | grep -q "^stopped at step "; }; then
    echo "worker $(hostname): the training was cut off"
  else
    echo "worker $(hostname): the training ended with status $status"
  fi
  exit "$status"
}

# ---- On the workstation ----------------------------------------------------------------------------------------------

tpu() {
  run gcloud compute tpus "$@" "${place[@]}"
}

# ask KIND FORMAT: what gcloud knows of the TPU; ABSENT if there is none. Other failures are tried again, then fatal.
ask() {
  local _
  for _ in 1 2 3 4 5; do
    if gcloud compute tpus "$1" describe "$name" "--format=value($2)" "${place[@]}" 2>"$scratch/error"; then
      return
    elif grep -q NOT_FOUND "$scratch/error"; then
      echo ABSENT
      return
    fi
    sleep "$poll_seconds"
  done
  die "gcloud cannot describe $name: $(grep -v '^$' "$scratch/error" | tail -n 1)"
}

# The state of the queued resource; once that is active, of the TPU: a preempted one can belong to an active request.
get_state() {
  local request machine
  request=$(ask queued-resources state.state) || exit 2
  machine=READY
  [ "$request" != ACTIVE ] || machine=$(ask tpu-vm state) || exit 2
  case $machine in
    READY) echo "$request" ;;
    ABSENT) echo TERMINATED ;;
    *) echo "$machine" ;;
  esac
}

# leave STATUS: the TPU stays, and is paid for.
leave() {
  echo "$name is still there and charged for; to delete it: $(quoted gcloud compute tpus queued-resources delete "$name" --force "${place[@]}")"
  exit "$1"
}

# again REASON: count a restart; the last failure's status if there were too many.
again() {
  restarts=$((restarts + 1))
  if [ "$restarts" -gt "$max_restarts" ]; then
    echo "error: $1; given up after --max_restarts=$max_restarts" >&2
    [ "$status" != 0 ] || status=1
    leave "$status"
  fi
  echo "$1; restart $restarts of $max_restarts"
}

create_tpu() {
  tpu queued-resources create "$name" "--node-id=$name" "--accelerator-type=$accelerator_type" \
    "--runtime-version=$runtime_version" ${spot:+--spot}
}

# Returns when the TPU can be used; makes it, or makes it anew, as needed.
wait_until_active() {
  local state last=""
  while true; do
    state=$(get_state) || exit 2
    [ "$state" = "$last" ] || echo "$name: $state"
    last=$state
    case $state in
      ACTIVE)
        known=1
        return
        ;;
      ABSENT)
        [ -z "$known" ] || again "the TPU is gone"
        run_id=""
        if create_tpu; then
          known=1
        elif [ -z "$known" ]; then
          die "gcloud could not ask for $name"
        fi
        ;;
      PREEMPTED | TERMINATED | SUSPENDED | FAILED)
        echo "$name is $state; deleting what is left of it"
        tpu queued-resources delete "$name" --force || again "deleting $name failed"
        ;;
      STOPPED | HIDDEN) die "$name is $state; start it, or delete it" ;;
    esac
    sleep "$poll_seconds"
  done
}

# The committed state of the repository, installed on all workers; a training that runs there is stopped.
prepare_workers() {
  local archive="build/$name.tar.gz" install
  install="mkdir -p djepa_jax && tar -xzf djepa_jax.tar.gz -C djepa_jax && cd djepa_jax"
  install="$install && bash launch/train_tpu_vm.sh --on_worker=stop && bash launch/setup.sh tpu --install_python"
  [ -n "$dry_run" ] || mkdir -p build
  run git archive --format=tar.gz "--output=$archive" HEAD &&
    tpu tpu-vm scp "$archive" "$name:djepa_jax.tar.gz" --worker=all &&
    tpu tpu-vm ssh "$name" --worker=all "--command=$install" </dev/null
}

# Runs the program on all workers. DJEPA_DISTRIBUTED=tpu tells it to start jax.distributed.
train() {
  tpu tpu-vm ssh "$name" --worker=all "--command=cd djepa_jax && $(quoted bash launch/train_tpu_vm.sh "--on_worker=$run_id" -- \
    env DJEPA_DISTRIBUTED=tpu JAX_PLATFORMS=tpu,cpu .venv/bin/python -m djepa_jax.main "$config_flag" "--workdir=$workdir" \
    ${data[@]+"${data[@]}"} ${extra[@]+"${extra[@]}"})" </dev/null
}

name="" zone="" project="" accelerator_type="" runtime_version="" spot="" config="" config_json="" workdir="" cache="" autoencoder=""
max_restarts=100 poll_seconds=30 dry_run="" on_worker=""
parse_flags "name zone project accelerator_type runtime_version config config_json workdir cache autoencoder max_restarts \
  poll_seconds on_worker" "spot dry_run" "$@"
if [ "$on_worker" = stop ]; then
  stop_training
  exit
elif [ -n "$on_worker" ]; then
  follow_training "$on_worker" "${extra[@]}"
fi

require name zone accelerator_type
[ -n "$config$config_json" ] || require config
require workdir
case $workdir in gs://?*) ;; *) die "--workdir=$workdir: give a bucket, gs://BUCKET/DIR; disks of a TPU go with it" ;; esac
case $cache in
  "" | gs://?*) ;;
  *) die "--cache=$cache: a TPU reads a bucket, gs://BUCKET/CACHE; copy the cache there: gcloud storage cp -r CACHE gs://BUCKET/CACHE" ;;
esac
case $autoencoder in
  "" | gs://?*) ;;
  *) die "--autoencoder=$autoencoder: a TPU reads a bucket, gs://BUCKET/kl16.ckpt; copy the file there: gcloud storage cp" ;;
esac
case $max_restarts$poll_seconds in *[!0-9]*) die "--max_restarts and --poll_seconds are whole numbers" ;; esac
if [ -z "$runtime_version" ]; then
  case $accelerator_type in
    v6e-*) runtime_version=v2-alpha-tpuv6e ;;
    v5p-*) runtime_version=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
    v[234]-*) runtime_version=tpu-ubuntu2204-base ;;
    *) die "--runtime_version is missing, and not known for --accelerator_type=$accelerator_type" ;;
  esac
fi
take_config
case $config_flag in
  *=gs://*) ;;
  *)
    committed=${config_flag#*=}
    [ -n "$config_json" ] || committed=${committed%%:*}
    git cat-file -e "HEAD:./$committed" 2>/dev/null ||
      die "${config_flag%%=*} \"${config_flag#*=}\" is not committed in $PWD; only what git has is copied"
    ;;
esac
data=()
[ -z "$cache" ] || data+=("--config.data.path=$cache")
[ -z "$autoencoder" ] || data+=("--config.autoencoder.path=$autoencoder")
place=("--zone=$zone" --quiet)
[ -z "$project" ] || place+=("--project=$project")
run_id="" known="" installed="" restarts=0 status=0

new_run() {
  run_id="$(date +%Y%m%d-%H%M%S)-$$-$restarts"
}

if [ -n "$dry_run" ]; then
  new_run
  quoted gcloud compute tpus queued-resources describe "$name" "--format=value(state.state)" "${place[@]}"
  create_tpu
  prepare_workers
  train
  exit
fi
command -v gcloud >/dev/null 2>&1 || die "no gcloud here; install the Google Cloud CLI and log in"
[ -z "$(git status --porcelain)" ] || echo "note: changes that are not committed are not copied to the TPU"
scratch=$(mktemp -d)
trap 'rm -rf -- "$scratch"' EXIT
trap 'echo "interrupted here; a training on $name goes on" >&2; leave 130' INT

while true; do
  wait_until_active
  if [ -z "$run_id" ]; then
    if ! prepare_workers; then
      sleep "$poll_seconds"
      state=$(get_state) || exit 2
      if [ "$state" = ACTIVE ]; then
        [ -n "$installed" ] || leave 2
        again "copying or installing failed"
      fi
      continue
    fi
    installed=1
    new_run
  fi
  set +e
  train 2>&1 | tee "$scratch/output"
  status=${PIPESTATUS[0]}
  set -e
  if grep -q "the training was cut off$" "$scratch/output"; then
    reason="the training was cut off" run_id=""
  elif [ "$status" = 0 ]; then
    echo "the training is complete"
    leave 0
  elif grep -q "another launch has taken over$" "$scratch/output"; then
    exit "$status"
  elif grep -q "the training ended with status [1-9]" "$scratch/output"; then
    reason="the training failed with status $status" run_id=""
  else
    reason="the connection to $name is lost"
  fi
  sleep "$poll_seconds"
  state=$(get_state) || exit 2
  if [ "$state" = ACTIVE ]; then
    case $reason in *failed*) echo "$reason" && leave "$status" ;; esac
    again "$reason"
  fi
done
