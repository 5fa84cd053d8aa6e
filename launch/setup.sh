#!/usr/bin/env bash
# Prepare a fresh machine: make .venv, install for its platform (cpu by default), show the devices that JAX finds.
#
#   bash launch/setup.sh [cpu|cuda|tpu] [--install_python] [--dry_run]
#   bash launch/setup.sh tpu --install_python
#
# --install_python fetches Python 3.12 with uv where no Python 3.11 or newer is found, as on the images of Cloud TPU
# (Python 3.10); it needs no root. A TPU of several hosts shows its devices only when this runs on all of them at once.
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

dry_run="" install_python="" platform=cpu
case ${1:-} in [!-]*) platform=$1 && shift ;; esac
parse_flags "" "install_python dry_run" "$@"
[ "${#extra[@]}" = 0 ] || die "\"${extra[0]}\" is a flag of the program; this script installs, it does not run it"

if [ -n "$install_python" ] && [ ! -x "$PYTHON" ] && ! (find_python) >/dev/null 2>&1; then
  uv=build/uv/bin/uv
  run python3 -m pip install --quiet --disable-pip-version-check --target=build/uv uv 2>/dev/null ||
    die "python3 -m pip cannot install uv; is there a network, and has python3 pip?"
  run "$uv" --quiet python install --no-bin 3.12 ||
    die "uv cannot fetch Python 3.12; install Python 3.11 or newer and set DJEPA_PYTHON to its path"
  DJEPA_PYTHON=$("$uv" python find --managed-python 3.12 2>/dev/null) || DJEPA_PYTHON=python3.12 # a dry run has no uv
fi
prepare "$platform"
run "$PYTHON" -c "import jax; print(jax.devices())"
