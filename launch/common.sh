# shellcheck shell=bash
# Shared by the scripts here: one virtual environment in .venv, installed once per change of requirements; flags; dry runs.
# Sourced, not run. `prepare` sets PYTHON to the environment's interpreter. Changes into the repository, from which
# all relative paths count.

set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

die() {
  echo "error: $*" >&2
  exit 2
}

# quoted WORD...: the words on one line, quoted for the shell where they need it.
quoted() {
  local word line=""
  for word in "$@"; do
    case $word in
      *[[:cntrl:]]* | *\'*[\"\$\`\\!]* | *[\"\$\`\\!]*\'*) printf -v word %q "$word" ;;
      *\'*) word="\"$word\"" ;;
      "" | *[!A-Za-z0-9_./:=,@%+-]*) word="'$word'" ;;
    esac
    line="$line$word "
  done
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
}

# parse_flags "NAME..." "SWITCH..." ARGUMENT...: set $NAME to the VALUE of --NAME=VALUE and $SWITCH to 1. What is for the
# program, --config.KEY=VALUE and all that follows --, goes to the array `extra`.
parse_flags() {
  local _values=" $1 " _switches=" $2 " _name # underscored: the flags themselves are variables of the caller
  shift 2
  extra=()
  while [ $# -gt 0 ]; do
    _name=${1%%=*}
    _name=${_name#--}
    case $1 in
      -h | --help)
        show_help
        exit 0
        ;;
      --)
        shift
        extra+=("$@")
        return
        ;;
      --config.*=*) extra+=("$1") ;;
      --?*)
        case "$_values" in
          *" ${_name:-=} "*)
            case $1 in
              --*=?*) printf -v "$_name" %s "${1#*=}" ;;
              *) die "--$_name needs a value: --$_name=VALUE" ;;
            esac
            ;;
          *)
            case "$_switches" in *" ${1#--} "*) ;; *) die "unknown flag \"$1\"; --help lists the flags, those of the program go after --" ;; esac
            printf -v "$_name" 1
            ;;
        esac
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

# check_config FILE: it must be there, before anything is installed for it.
check_config() {
  [ -f "${1%%:*}" ] || die "--config \"$1\" is not a file (relative paths count from $PWD)"
}

# take_config: --config=FILE or --config_json=FILE; sets config_flag, what the program is given of them.
# shellcheck disable=SC2034 # the caller reads it
take_config() {
  [ -z "$config" ] || [ -z "$config_json" ] || die "--config and --config_json are both given; leave out one of them"
  if [ -z "$config_json" ]; then
    require config
    check_config "$config"
    config_flag="--config=$config"
    return
  fi
  case $config_json in
    gs://?*) ;; # the program reads it
    *) [ -f "$config_json" ] || die "--config_json \"$config_json\" is not a file (relative paths count from $PWD)" ;;
  esac
  config_flag="--config_json=$config_json"
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

# is_prepared PLATFORM [EXTRA]: does .venv hold exactly this? Sets PYTHON and stamp, the file that records it.
is_prepared() {
  PYTHON="$PWD/.venv/bin/python"
  stamp=".venv/installed-$1${2:+-$2}"
  [ -x "$PYTHON" ] && [ -f "$stamp" ] && cat requirements.txt pyproject.toml | cmp -s - "$stamp"
}

# prepare PLATFORM [EXTRA]: make .venv and install; does nothing when it already holds exactly this.
prepare() {
  local platform=$1 extra_name=${2:-} jax base requirements itself extras=${2:-}
  case $platform in
    cpu) jax="jax" ;;
    cuda) jax="jax[cuda13]" ;;
    tpu) jax="jax[tpu]" extras="gcs${extras:+,$extras}" ;; # workdirs there are in buckets
    *) die "unknown platform \"$platform\"; use cpu, cuda or tpu" ;;
  esac
  if is_prepared "$platform" "$extra_name"; then
    return
  fi
  # setuptools is named because the project itself is installed without build isolation, from this environment.
  requirements=("$PYTHON" -m pip install --quiet --disable-pip-version-check "setuptools>=69" wheel "$jax" -r requirements.txt)
  itself=("$PYTHON" -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".${extras:+[$extras]}")
  if [ -n "${dry_run:-}" ]; then
    [ -x "$PYTHON" ] || quoted "$( (find_python) 2>/dev/null || echo "${DJEPA_PYTHON:-python3}")" -m venv .venv
    quoted "${requirements[@]}"
    quoted "${itself[@]}"
    return
  fi
  if [ ! -x "$PYTHON" ]; then
    base=$(find_python) || exit 2
    echo "making .venv with $("$base" --version)"
    "$base" -m venv .venv >/dev/null 2>&1 || die "cannot make a virtual environment in $PWD/.venv (on Debian and Ubuntu: apt install python3-venv)"
  fi
  echo "installing requirements ($platform${extra_name:+, $extra_name}); about a gigabyte, once"
  if ! "${requirements[@]}" >.venv/pip.log 2>&1 || ! "${itself[@]}" >>.venv/pip.log 2>&1; then
    die "installing failed; is there a network? The last line of $PWD/.venv/pip.log: $(grep -i error .venv/pip.log | tail -n 1)"
  fi
  cat requirements.txt pyproject.toml >"$stamp"
}
