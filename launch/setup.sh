#!/usr/bin/env bash
# Prepare a fresh machine: make .venv, install for its platform (cpu by default), show the devices that JAX finds.
#
#   bash launch/setup.sh [cpu|cuda|tpu] [--install_python] [--dry_run]
#   bash launch/setup.sh tpu --install_python
#
# --install_python fetches Python 3.12 into .venv where no Python 3.11 or newer is found, as on the images of Cloud TPU
# (Python 3.10); it needs no root. A TPU of several hosts shows its devices only when this runs on all of them at once.
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

# The interpreter comes from uv; everything stays below .venv.
install_python() {
  if [ -x .venv/bin/python ] || (find_python) >/dev/null 2>&1; then
    return
  fi
  [ -n "$dry_run" ] || echo "fetching Python 3.12 into .venv/python"
  run python3 -m pip install --quiet --disable-pip-version-check --target=.venv/uv uv ||
    die "cannot install uv; is there a network, and has python3 pip?"
  run .venv/uv/bin/uv --quiet python install --no-bin --install-dir=.venv/python 3.12 ||
    die "uv cannot fetch Python 3.12; install Python 3.11 or newer and set DJEPA_PYTHON to its path"
  DJEPA_PYTHON=$(find .venv/python -path '*/bin/python3.12' 2>/dev/null | head -n 1) || true
  : "${DJEPA_PYTHON:=.venv/python/cpython-3.12/bin/python3.12}"
}

dry_run="" install_python="" platform=cpu
case ${1:-} in
  cpu | cuda | tpu)
    platform=$1
    shift
    ;;
  "" | -*) ;;
  *) die "unknown platform \"$1\"; use cpu, cuda or tpu, then flags that start with --" ;;
esac
parse_flags "" "install_python dry_run" "$@"
[ "${#extra[@]}" = 0 ] || die "\"${extra[0]}\" is a flag of the program; this script installs, it does not run it"

[ -z "$install_python" ] || install_python
prepare "$platform"
run "$PYTHON" -c "import jax; print(jax.devices())"
