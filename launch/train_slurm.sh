#!/usr/bin/env bash
# Train under Slurm: whole nodes, one process per node with all its GPUs. Submit it from the repository, on a file system
# that all nodes share, after `bash launch/setup.sh cuda`:
#
#   sbatch --nodes=2 launch/train_slurm.sh --config=FILE|--config_json=FILE --workdir=DIR [--platform=cuda] [--dry_run]
#       [--config.KEY=VALUE ...] [-- more flags for djepa_jax.main]
#   sbatch --nodes=2 --gpus-per-node=4 --time=12:00:00 launch/train_slurm.sh --config=configs/djepa_l.py --workdir=/data/runs/l
#
# Flags of sbatch override the #SBATCH lines below. Five minutes before the time limit the processes get SIGTERM: they
# save and stop, and the same command goes on. To queue several stretches at once, submit the command several times with
# --job-name=NAME --dependency=singleton: they run one after the other, and a finished run ends at once. A preempted job
# goes back into the queue and on from there. With `-- --mode=prepare` each node makes its share of a latent cache.
#SBATCH --job-name=djepa_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log

set -euo pipefail
repository=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
[ -f "$repository/launch/common.sh" ] || repository=$PWD # Slurm runs a copy of this script, from a folder of its own
if [ ! -f "$repository/launch/common.sh" ]; then
  echo "error: $PWD is not the repository; submit from there, or with sbatch --chdir=REPOSITORY" >&2
  exit 2
fi
# shellcheck source=SCRIPTDIR/common.sh
source "$repository/launch/common.sh"

config="" config_json="" workdir="" platform=cuda dry_run=""
parse_flags "config config_json workdir platform" "dry_run" "$@"
[ -n "$config_json" ] || require config
require workdir
case $platform in cpu | cuda) ;; *) die "--platform=$platform: use cuda or cpu" ;; esac
if ! is_prepared "$platform" && [ -z "$dry_run" ]; then
  die "$PWD/.venv is not installed, or not for these requirements; run: bash launch/setup.sh $platform"
fi
[ -n "${SLURM_JOB_ID:-}${dry_run}" ] || die "this is not a Slurm job; submit it: sbatch --nodes=1 launch/train_slurm.sh ..."

# Expanded on the node, where JAX would take one GPU only, the one of the process's local rank; JAX_LOCAL_DEVICE_IDS
# names all that Slurm shows. exec in every shell on the way: Slurm's signal must reach the program itself.
# shellcheck disable=SC2016
on_node='gpus=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, -)}
commas=${gpus//[^,]/}; [ -z "$gpus" ] || export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 ${#commas})
case " $* " in *" --mode=prepare "*) exec "$@" --shard=$SLURM_PROCID/$SLURM_NTASKS ;; esac
exec "$@" --distributed=slurm'
settings=("XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}")
[ "$platform" != cuda ] || settings+=("JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}" "XLA_FLAGS=$GPU_XLA_FLAGS")
run_last srun --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none env "${settings[@]}" bash -c "$on_node" on_node \
  "$PYTHON" -m djepa_jax.main ${config:+"--config=$config"} ${config_json:+"--config_json=$config_json"} \
  "--workdir=$workdir" ${extra[@]+"${extra[@]}"}
