#!/usr/bin/env bash
# Train on a Cloud TPU, from a workstation with gcloud: ask for the TPU, copy the committed state of this repository to
# all its workers, install, train; and begin again from the last checkpoint when a spot TPU was taken away.
#
#   bash launch/train_tpu_vm.sh --name=NAME --zone=ZONE --accelerator_type=TYPE --config=FILE|--config_json=FILE
#       --workdir=gs://BUCKET/DIR [--cache=gs://BUCKET/CACHE] [--autoencoder=gs://BUCKET/kl16.safetensors] [--spot]
#       [--project=ID] [--runtime_version=IMAGE] [--max_restarts=100] [--poll_seconds=30] [--dry_run]
#       [--config.KEY=VALUE ...] [-- more flags for djepa_jax.main]
#   bash launch/train_tpu_vm.sh --name=djepa --zone=us-east5-b --accelerator_type=v6e-16 --spot \
#       --config=configs/djepa_l.py --workdir=gs://mine/l --cache=gs://mine/latents --autoencoder=gs://mine/kl16.safetensors
#
# --cache and --autoencoder become --config.data.path and --config.autoencoder.path; every worker copies them to its disk.
# The training outlives a lost connection and Ctrl-C here; the same command stops it, once it has saved, and goes on with
# the repository as it is then. The TPU is never deleted, except to replace one that is gone. For several workers gcloud
# wants its key in the agent: ssh-add ~/.ssh/google_compute_engine
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

tpu() { run gcloud compute tpus "$@" "--zone=$zone" --quiet ${project:+"--project=$project"}; }

# The state of the request; once that is active, of the machine, which can be gone while its request is still there.
get_state() {
  local this="--filter=name~/$name\$" state
  state=$(tpu queued-resources list "$this" "--format=value(state.state)") || return
  if [ "$state" = ACTIVE ]; then
    state=$(tpu tpu-vm list "$this" "--format=value(state)") || return
    : "${state:=TERMINATED}"
  fi
  echo "${state:-ABSENT}"
}

create_tpu() {
  tpu queued-resources create "$name" "--node-id=$name" "--accelerator-type=$accelerator_type" \
    "--runtime-version=$runtime_version" ${spot:+--spot}
}

# leave STATUS REASON: the TPU stays, and is paid for.
leave() {
  echo "$2; to delete $name, which is charged for: $(dry_run=1 tpu queued-resources delete "$name" --force)"
  exit "$1"
}

# again REASON: count a restart; the end if there were too many.
again() {
  [ "$restarts" -lt "$max_restarts" ] || leave 1 "$1; given up after --max_restarts=$max_restarts"
  restarts=$((restarts + 1))
  echo "$1; restart $restarts of $max_restarts"
}

# Returns when the TPU can be used; replaces it when it is gone.
wait_until_ready() {
  local state last=""
  while true; do
    state=$(get_state) || state=UNKNOWN
    [ "$state" = "$last" ] || echo "$name: $state"
    last=$state
    case $state in
      READY) return ;;
      ABSENT) again "the TPU is gone" && { create_tpu || true; } ;;
      PREEMPTED | TERMINATED | SUSPENDED | FAILED) tpu queued-resources delete "$name" --force || true ;;
    esac
    sleep "$poll_seconds"
  done
}

# The committed state of the repository, installed on all workers; a training that runs there is stopped.
prepare_workers() {
  run git archive --format=tar.gz "--output=$archive" HEAD &&
    tpu tpu-vm scp "$archive" "$name:djepa_jax.tar.gz" --worker=all &&
    tpu tpu-vm ssh "$name" --worker=all "--command=mkdir -p djepa_jax && tar -xzf djepa_jax.tar.gz -C djepa_jax && \
cd djepa_jax && bash launch/tpu_worker.sh stop && bash launch/setup.sh tpu --install_python" </dev/null
}

train() {
  tpu tpu-vm ssh "$name" --worker=all "--command=cd djepa_jax && $(quoted bash launch/tpu_worker.sh follow "$(date +%s)-$$-$restarts" \
    env JAX_PLATFORMS=tpu,cpu .venv/bin/python -m djepa_jax.main "${program[@]}" --distributed=tpu)" </dev/null
}

name="" zone="" project="" accelerator_type="" runtime_version="" spot="" config="" config_json="" workdir="" cache=""
autoencoder="" max_restarts=100 poll_seconds=30 dry_run=""
parse_flags "name zone project accelerator_type runtime_version config config_json workdir cache autoencoder \
  max_restarts poll_seconds" "spot dry_run" "$@"
require name zone accelerator_type workdir
[ -n "$config_json" ] || require config
for path in "$workdir" ${cache:+"$cache"} ${autoencoder:+"$autoencoder"}; do
  [[ $path == gs://?* ]] || die "\"$path\" is no bucket; the disks of a TPU go with it: gcloud storage cp -r $path gs://BUCKET"
done
[ -n "$runtime_version" ] || case $accelerator_type in
  v6e-*) runtime_version=v2-alpha-tpuv6e ;;
  v5p-*) runtime_version=v2-alpha-tpuv5 ;;
  v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
  v[234]-*) runtime_version=tpu-ubuntu2204-base ;;
esac
require runtime_version
for path in "${config%%:*}" "$config_json"; do
  [[ $path != *[./]* || $path == gs://* ]] || git cat-file -e "HEAD:./$path" 2>/dev/null ||
    die "\"$path\" is not committed in $PWD; only what git has is copied"
done
program=(${config:+"--config=$config"} ${config_json:+"--config_json=$config_json"} "--workdir=$workdir"
  ${cache:+"--config.data.path=$cache"} ${autoencoder:+"--config.autoencoder.path=$autoencoder"} ${extra[@]+"${extra[@]}"})
archive="build/$name.tar.gz" installed="" restarts=0
if [ -n "$dry_run" ]; then create_tpu && prepare_workers && train && exit; fi
command -v gcloud >/dev/null 2>&1 || die "no gcloud here; install the Google Cloud CLI and log in"
mkdir -p build
trap 'leave 130 "interrupted here, the training goes on"' INT
state=$(get_state 2>&1) || die "gcloud cannot look for $name: $(grep . <<<"$state" | tail -n 1)"
[ "$state" != ABSENT ] || create_tpu || die "gcloud could not ask for $name"
while true; do
  wait_until_ready
  status=0
  { prepare_workers && installed=1 && train; } || status=$? # what they mean: tpu_worker.sh
  [ "$status" != 0 ] || leave 0 "the training is complete"
  sleep "$poll_seconds" # until a preemption shows
  state=$(get_state) || state=READY
  case $state:$status:$installed in
    READY:1:1) again "the connection to $name is lost" ;;
    READY:75:1) again "the training was cut off" ;;
    READY:76:1) die "another launch has taken over" ;;
    READY:*) leave "$status" "installing or training failed with status $status" ;;
  esac
done
