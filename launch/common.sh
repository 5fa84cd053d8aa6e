# shellcheck shell=bash
# Shared by the scripts here, sourced and not run: flags, dry runs, and the virtual environment
# .venv. Changes into the repository, from which all relative paths count.

set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
PYTHON="$PWD/.venv/bin/python"
# Large pages for what programs allocate (glibc 2.35 or newer), in place of 100,000 small ones for
# every training step on a CPU, which takes about an eighth less time (docs/benchmarks.md)
export GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}"

# On NVIDIA GPUs: products by cuBLAS alone. As fast as with XLA's own kernels beside it, and compiled
# in a third of the time (docs/benchmarks.md)
# shellcheck disable=SC2034  # the scripts for GPUs use it
GPU_XLA_FLAGS="${XLA_FLAGS---xla_gpu_enable_triton_gemm=false}"

die() {
  echo "error: $*" >&2
  exit 2
}

# quoted WORD...: the words on one line, as a shell reads them.
quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}

# run COMMAND...: run it; with --dry_run only print it.
run() {
  if [ -n "${dry_run:-}" ]; then quoted "$@"; else "$@"; fi
}

# run_last COMMAND...: the same, in the place of this shell: signals reach the command.
run_last() {
  if [ -n "${dry_run:-}" ]; then quoted "$@"; else exec "$@"; fi
}

# The comment at the head of a script is its help.
show_help() {
  sed -n -e 1d -e '/^#SBATCH/d' -e '/^#/!q' -e 's/^# \{0,1\}//p' "launch/$(basename -- "$0")"
  exit
}

# parse_flags "NAME..." "SWITCH..." ARGUMENT...: set $NAME to the VALUE of --NAME=VALUE and $SWITCH
# to 1. What is for the program, --config.KEY=VALUE and all that follows --, goes to `extra`.
parse_flags() {
  local _values=" $1 " _switches=" $2 " _name # underscored: flags are variables of the caller
  shift 2
  extra=()
  while [ $# -gt 0 ]; do
    _name=${1#--}
    _name=${_name%%=*}
    case $1 in
      -h | --help) show_help ;;
      --) extra+=("${@:2}") && return ;;
      --config.*=*) extra+=("$1") ;;
      --?*)
        if [[ $_values == *" $_name "* ]]; then
          [[ $1 == --*=?* ]] || die "--$_name needs a value: --$_name=VALUE"
          printf -v "$_name" %s "${1#*=}"
        elif [[ $_switches == *" ${1#--} "* ]]; then
          printf -v "$_name" 1
        else
          die "unknown flag \"$1\"; --help lists the flags, those of the program go after --"
        fi
        ;;
      *) die "\"$1\" is not a flag; values are given as --flag=VALUE" ;;
    esac
    shift
  done
}

# require NAME...: these flags must have been given.
require() {
  local _name
  for _name in "$@"; do
    [ -n "${!_name}" ] || die "--$_name is missing; --help shows an example"
  done
}

# The first Python of version 3.11 or newer; DJEPA_PYTHON names one outright.
find_python() {
  local name names=(python3 python3.14 python3.13 python3.12 python3.11)
  [ -z "${DJEPA_PYTHON:-}" ] || names=("$DJEPA_PYTHON")
  for name in "${names[@]}"; do
    "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue
    command -v "$name"
    return
  done
  die "Python 3.11 or newer is needed, found $("${names[0]}" --version 2>/dev/null || echo none);" \
    "install one or set DJEPA_PYTHON to its path"
}

# is_prepared PLATFORM [EXTRA]: does .venv hold exactly this? `stamp` is the file that says so.
is_prepared() {
  stamp=".venv/installed-$1${2:+-$2}"
  [ -x "$PYTHON" ] && cat requirements.txt pyproject.toml | cmp -s - "$stamp"
}

pip_install() {
  local quiet=(--quiet --progress-bar=off --disable-pip-version-check --log=.venv/pip.log)
  run "$PYTHON" -m pip install "${quiet[@]}" "$@" 2>/dev/null ||
    die "installing failed; is there a network? .venv/pip.log ends with:" \
      "$(sed -n 's/.*ERROR: //p' .venv/pip.log 2>/dev/null | tail -n 1)"
}

# prepare PLATFORM [EXTRA]: make .venv and install, unless it holds exactly this already.
prepare() {
  local base jax extras=${2:-}
  case $1 in
    cpu) jax="jax" ;;
    cuda) jax="jax[cuda13]" ;;
    tpu) jax="jax[tpu]" extras="gcs${2:+,$2}" ;; # workdirs there are in buckets
    *) die "unknown platform \"$1\"; use cpu, cuda (for GPUs) or tpu" ;;
  esac
  ! is_prepared "$@" || return 0
  if [ ! -x "$PYTHON" ]; then
    base=$(find_python) || exit 2
    run "$base" -m venv .venv || die "cannot make .venv (on Debian: apt install python3-venv)"
  fi
  [ -n "${dry_run:-}" ] || echo "installing into .venv ($1${2:+, $2}): about a gigabyte, once"
  # setuptools is named because the project is installed without build isolation.
  pip_install "setuptools>=77" wheel "$jax" -r requirements.txt
  pip_install --no-build-isolation -e ".${extras:+[$extras]}"
  [ -n "${dry_run:-}" ] || cat requirements.txt pyproject.toml >"$stamp"
}
