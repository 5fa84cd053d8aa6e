# Shared by the scripts here: one virtual environment in .venv, installed once per change of requirements.
# Sourced, not run. Sets PYTHON to the environment's interpreter and changes into the repository.

set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

die() {
  echo "error: $*" >&2
  exit 2
}

# The first Python of version 3.11 or newer; DJEPA_PYTHON names one outright.
find_python() {
  local name
  for name in ${DJEPA_PYTHON:+"$DJEPA_PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 python; do
    if command -v "$name" >/dev/null 2>&1 &&
      "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$name"
      return
    fi
    [ "$name" = "${DJEPA_PYTHON:-}" ] && break
  done
  die "Python 3.11 or newer is needed, found $("${DJEPA_PYTHON:-python3}" --version 2>&1 || true); install one or set DJEPA_PYTHON to its path"
}

# prepare PLATFORM [EXTRA]: make .venv and install; does nothing when it already holds exactly this.
prepare() {
  local platform=$1 extra=${2:-} jax stamp base
  case $platform in
    cpu) jax="jax" ;;
    cuda) jax="jax[cuda13]" ;;
    tpu) jax="jax[tpu]" ;;
    *) die "unknown platform \"$platform\"; use cpu, cuda or tpu" ;;
  esac
  PYTHON="$PWD/.venv/bin/python"
  stamp=".venv/installed-$platform${extra:+-$extra}"
  if [ -x "$PYTHON" ] && [ -f "$stamp" ] && cat requirements.txt pyproject.toml | cmp -s - "$stamp"; then
    return
  fi
  if [ ! -x "$PYTHON" ]; then
    base=$(find_python) || exit 2
    echo "making .venv with $("$base" --version)"
    "$base" -m venv .venv >/dev/null 2>&1 || die "cannot make a virtual environment in $PWD/.venv (on Debian and Ubuntu: apt install python3-venv)"
  fi
  echo "installing requirements ($platform${extra:+, $extra}); about a gigabyte, once"
  # setuptools is named because the project itself is installed without build isolation, from this environment.
  if ! "$PYTHON" -m pip install --quiet --disable-pip-version-check "setuptools>=69" wheel "$jax" -r requirements.txt >.venv/pip.log 2>&1 ||
    ! "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".${extra:+[$extra]}" >>.venv/pip.log 2>&1; then
    die "installing failed; is there a network? The last line of $PWD/.venv/pip.log: $(grep -i error .venv/pip.log | tail -n 1)"
  fi
  cat requirements.txt pyproject.toml >"$stamp"
}
