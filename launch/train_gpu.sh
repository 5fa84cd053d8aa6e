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

config="" config_json="" workdir="" gpus="" dry_run=""
parse_flags "config config_json workdir gpus" "dry_run" "$@"
[ -n "$config_json" ] || require config
require workdir

if [ -z "$dry_run" ]; then
  listing=$(nvidia-smi -L 2>&1) || true
  count=$(grep -c '^GPU ' <<<"$listing") ||
    die "nvidia-smi finds no GPU (bash launch/local.sh trains on the CPU): $(tail -n 1 <<<"$listing")"
  for number in ${gpus//,/ }; do
    grep -q "^GPU $number:" <<<"$listing" ||
      die "--gpus=$gpus: there is no GPU $number; nvidia-smi -L lists 0 to $((count - 1)), name some as in --gpus=0,1"
  done
fi
prepare cuda
settings=("XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}" "JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}")
settings+=("XLA_FLAGS=$GPU_XLA_FLAGS")
run_last env "${settings[@]}" ${gpus:+"CUDA_VISIBLE_DEVICES=$gpus"} "$PYTHON" -m djepa_jax.main \
  ${config:+"--config=$config"} ${config_json:+"--config_json=$config_json"} "--workdir=$workdir" ${extra[@]+"${extra[@]}"}
