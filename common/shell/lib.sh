# shellcheck shell=bash
#
# What the steps share: the settings' help, required settings, and one way to run a command.
# Sourced by the body of a step, after the vendor's script has its settings and VENDOR, its folder.

STEP=$(realpath -- "${BASH_SOURCE[-1]}")
BODY=${BASH_SOURCE[1]}
KIT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)

# For every step / 所有步骤通用
: "${PYTHON:=}" # the Python that runs it; empty: the kit's .venv, else python3 / 空：先 .venv，再 python3

# settings FILE: the names of the settings that FILE declares, one a line.
settings() {
  sed -n 's/^: "${\([A-Z0-9_]*\):=.*/\1/p' "$1"
}

# describe FILE: its settings with their defaults and comments, under their headings.
describe() {
  awk '
    /^# / { heading = substr($0, 3); next }
    /^: "\$\{/ {
      if (heading != "") printf "\n%s\n", heading
      heading = ""
      end = match($0, /}" +# /)
      setting = substr($0, 6, end - 6)
      comment = substr($0, end + RLENGTH)
      sub(/:=$/, "", setting)
      sub(/:=/, "=", setting)
      printf "  %-28s  %s\n", setting, comment
      next
    }
    { heading = "" }
  ' "$1"
}

# Prints what the step does and its settings, all read from the scripts themselves.
help() {
  printf 'Usage: [NAME=value ...] %s [-h|--help] [-n|--dry-run] [-- FLAG ...]\n\n' "$0"
  sed -n -e 1d -e '/^#/!q' -e 's/^# \{0,1\}//p' "$STEP"
  describe "$STEP"
  describe "$BODY"
  describe "$VENDOR/env.sh"
  describe "${BASH_SOURCE[0]}"
  printf '\n-n prints the command and stops. What follows -- reaches Python last.\n'
  printf -- '-n 只打印命令，不执行。-- 之后的参数原样放在 Python 命令的最后。\n'
}

# Says a line about the step on stderr.
say() {
  printf '%s: %s\n' "${STEP##*/}" "$*" >&2
}

# Says what is wrong and how to go on, then exits 2 (wrong use).
die() {
  say "$* (see --help)"
  exit 2
}

# begin "$@": takes -h and -n; what follows -- goes to FLAGS, the names of the step's settings to SETTINGS.
# shellcheck disable=SC2034 # the bodies read SETTINGS
begin() {
  DRY_RUN=false FLAGS=() ARGS=()
  mapfile -t SETTINGS < <(settings "$STEP")
  while (($#)); do
    case $1 in
      -h | --help) help && exit 0 ;;
      -n | --dry-run) DRY_RUN=true ;;
      --) FLAGS=("${@:2}") && return ;;
      *) die "unknown argument '$1': settings are NAME=value before the script, Python's flags go after --" ;;
    esac
    shift
  done
}

# need NAME...: exits unless each is set, saying all that are not; 'A|B' asks for one of the two.
need() {
  local names name missing=()
  for names; do
    for name in ${names//|/ }; do [[ -z ${!name:-} ]] || continue 2; done
    missing+=("${names//|/ or }")
  done
  ((${#missing[@]} == 0)) || die "set $(printf '%s, ' "${missing[@]}" | sed 's/, $//')"
}

# one_of NAME VALUE...: exits unless the setting NAME is one of the values.
one_of() {
  local value
  for value in "${@:2}"; do [[ ${!1} != "$value" ]] || return 0; done
  die "$1=${!1} is not known: set it to $(printf '%s\n' "${@:2}" | paste -sd '|' | sed 's/|/ or /g')"
}

# old_name NEW OLD: lets the setting OLD stand for NEW, and says so; two values that differ are an error.
old_name() {
  local old=${!2:-}
  [[ -n $old ]] || return 0
  [[ -z ${!1:-} || ${!1} == "$old" ]] || die "$1=${!1} and $2=$old differ: set $1 only"
  say "$2 is the old name of $1: $1=$old"
  printf -v "$1" %s "$old"
}

# flags NAME...: adds --name-with-dashes VALUE to ARGS for each setting that is not empty.
flags() {
  local name flag
  for name; do
    flag=${name,,}
    [[ -z ${!name:-} ]] || ARGS+=("--${flag//_/-}" "${!name}")
  done
}

# The Python to run, as an absolute path.
find_python() {
  local python=${PYTHON:-$KIT/.venv/bin/python}
  [[ -n $PYTHON || -x $python ]] || python=python3
  python=$(command -v -- "$python") || die "PYTHON=$PYTHON is no program: bash common/shell/setup_venv.sh makes .venv"
  [[ $python == /* ]] || python=$PWD/$python
  printf '%s\n' "$python"
}

# run WORD...: becomes `python -m WORD... ARGS FLAGS`; the line it prints does the same from any folder and shell.
run() {
  local program name words
  program=$(find_python)
  words=(env -C "$PWD" "PYTHONPATH=$KIT${PYTHONPATH:+:$PYTHONPATH}" "KIT_PLATFORM=$KIT_PLATFORM")
  words+=(PYTHONSAFEPATH=1) # a folder `common` where the user stands must not be taken for ours
  for name in $(settings "$VENDOR/env.sh"); do words+=("$name=${!name}"); done
  words+=("$program" -m "$@" "${ARGS[@]}" "${FLAGS[@]}")
  if [[ $DRY_RUN == true ]]; then
    printf '%q ' "${words[@]}" | sed 's/ $/\n/'
  else
    printf '+' >&2
    printf ' %q' "${words[@]}" >&2
    printf '\n' >&2
    exec "${words[@]}"
  fi
}
