#!/usr/bin/env bash
# Train on one machine with NVIDIA GPUs: one process, all GPUs or those named. Installs first where that is needed.
#
#   bash launch/train_gpu.sh --config=FILE|--config_json=FILE --workdir=DIR [--gpus=0,1] [--dry_run]
#       [--config.KEY=VALUE ...] [-- more flags for djepa_jax.main]
#   bash launch/train_gpu.sh --gpus=0,1 --config=configs/digits.py --workdir=runs/digits --config.num_steps=2000
#
# Ctrl-C or SIGTERM saves and stops; the same command goes on. JAX may take 92 % of the memory of each GPU;
# XLA_PYTHON_CLIENT_MEM_FRACTION, if set, says how much instead. The program does not fall back to the CPU.
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

# The driver must answer, and know the GPUs of --gpus.
check_gpus() {
  local listing count number
  command -v nvidia-smi >/dev/null 2>&1 ||
    die "no nvidia-smi here: no NVIDIA driver is installed (bash launch/local.sh trains on the CPU)"
  listing=$(nvidia-smi -L 2>&1) || die "nvidia-smi finds no GPU: $(tail -n 1 <<<"$listing")"
  count=$(grep -c '^GPU ' <<<"$listing") || die "nvidia-smi finds no GPU: $(tail -n 1 <<<"$listing")"
  for number in ${gpus//,/ }; do
    [ "$number" -lt "$count" ] || die "--gpus=$gpus: there is no GPU $number; nvidia-smi -L lists 0 to $((count - 1))"
  done
}

config="" config_json="" workdir="" gpus="" dry_run=""
parse_flags "config config_json workdir gpus" "dry_run" "$@"
[ -n "$config$config_json" ] || require config
require workdir
[ -z "$gpus" ] || [[ $gpus =~ ^[0-9]+(,[0-9]+)*$ ]] || die "--gpus=$gpus: give numbers with commas between, such as --gpus=0,1"
take_config

if [ -n "$dry_run" ]; then quoted nvidia-smi -L; else check_gpus; fi
prepare cuda
settings=("XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}" "JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}")
[ -z "$gpus" ] || settings+=("CUDA_VISIBLE_DEVICES=$gpus")
run_last env "${settings[@]}" "$PYTHON" -m djepa_jax.main "$config_flag" "--workdir=$workdir" ${extra[@]+"${extra[@]}"}
