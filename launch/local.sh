#!/usr/bin/env bash
# Train the embedded default, real 8 x 8 digits, on this machine; run it again to go on or to see the results.
#
#   bash launch/local.sh [cpu|cuda|tpu] [extra flags for djepa_jax.main, such as --config.num_steps=200]
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

platform=cpu
case ${1:-} in
  -h | --help) show_help ;;
  [!-]*) platform=$1 && shift ;;
esac
prepare "$platform"
exec "$PYTHON" -m djepa_jax.main --config=configs/digits.py --workdir=runs/digits "$@"
