# shellcheck shell=bash
#
# Shared by the steps: help, required settings, and how a command is run.
# Sourced by the body of a step, after the vendor's script has set its settings and VENDOR, its folder.

set +o posix # as where `sh` is bash
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 402)) || {
  printf '%s: bash %s is too old: run it with bash 4.2 or later\n' "$0" "$BASH_VERSION" >&2
  exit 2
}

# Scripts parse bytes, whatever the user's locale: UTF-8 comments are invalid in GBK, and i is not the small I in Turkish.
# Python gets the user's locale.
LOCALE=${LC_ALL:-}
export LC_ALL=C

STEP=$(realpath -- "${BASH_SOURCE[-1]}")
BODY=${BASH_SOURCE[1]}
KIT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)

# For every step / 所有步骤通用
: "${SETTINGS:=}" # a file of NAME=value lines; the environment wins / NAME=value 设置文件；环境变量优先
: "${PYTHON:=}"   # the Python that runs it; empty: the kit's .venv, else python3 / 空：先 .venv，再 python3

# settings FILE: the names of the settings that FILE declares, one a line.
settings() {
  sed -n 's/^: "${\([A-Z0-9_]*\):=.*/\1/p' "$1"
}

# describe FILE: its settings with their defaults and comments, under their headings.
describe() {
  awk '
    /^# / { heading = substr($0, 3); next }
    /^: "\$\{[A-Z0-9_]+:=/ {
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

# Prints what the step does and its settings, read from the scripts.
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

# Prints a line about the step to stderr.
say() {
  printf '%s: %s\n' "${STEP##*/}" "$*" >&2
}

# Prints the error and its remedy, then exits 2 (wrong usage).
die() {
  say "$* (see --help)"
  exit 2
}

# exported NAME: whether the variable came with the environment; the scripts export no setting.
exported() {
  local words
  words=$(declare -p "$1" 2>/dev/null) # waited for: a < <(...) before exec would stay as a zombie of what is executed
  [[ $words =~ ^declare\ -[a-z]*x ]]
}

# value_of TEXT: the value in a line NAME=TEXT, without its quotes or the comment after it.
value_of() {
  local value
  if [[ $1 =~ ^\"([^\"]*)\"[[:space:]]*(#.*)?$ || $1 =~ ^\'([^\']*)\'[[:space:]]*(#.*)?$ ]]; then
    value=${BASH_REMATCH[1]}
  else
    value=${1%%[[:space:]]#*}
    value=${value%"${value##*[![:space:]]}"}
  fi
  printf '%s\n' "$value"
}

# read_settings FILE: sets the settings that its lines name, except those that the environment sets.
read_settings() {
  local line name value number=0 known where
  [[ -f $1 && -r $1 ]] || die "SETTINGS=$1 is no file that can be read"
  known=" $(settings "$STEP" | paste -sd ' ') $(settings "$BODY" | paste -sd ' ') "
  while IFS= read -r line || [[ -n $line ]]; do
    where="SETTINGS=$1, line $((++number))"
    line=${line#$'\xef\xbb\xbf'} line=${line%$'\r'}
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    [[ $line =~ ^[[:space:]]*(export[[:space:]]+)?([A-Za-z0-9_]+)=(.*)$ ]] || die "$where: '$line' is not NAME=value"
    name=${BASH_REMATCH[2]} value=$(value_of "${BASH_REMATCH[3]}")
    [[ $known == *" $name "* ]] || die "$where: $name is no setting of ${STEP##*/}"
    [[ $value != *[\$\`]* ]] || die "$where: $name=$value: nothing is expanded there, write the value itself"
    exported "$name" || printf -v "$name" %s "$value"
  done <"$1"
}

# begin "$@": handles -h and -n; stores what follows -- in FLAGS and the names of the step's settings in NAMES.
begin() {
  DRY_RUN=false FLAGS=() ARGS=()
  mapfile -t NAMES < <(settings "$STEP")
  [[ -z $SETTINGS ]] || read_settings "$SETTINGS"
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

# need NAME...: exits unless each is set, listing all that are not; 'A|B' requires one of the two.
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

# old_name NEW OLD: uses the setting OLD for NEW, and logs it; two different values are an error.
old_name() {
  local old=${!2:-}
  [[ -n $old ]] || return 0
  [[ -z ${!1:-} || ${!1} == "$old" ]] || die "$1=${!1} and $2=$old differ: set $1 only"
  say "$2 is the old name of $1: $1=$old"
  printf -v "$1" %s "$old"
}

# in_users_locale WORD...: executes the command in the locale that the script was started in.
in_users_locale() {
  if [[ -n $LOCALE ]]; then
    exec env LC_ALL="$LOCALE" "$@"
  else
    exec env -u LC_ALL "$@"
  fi
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
  local wanted=${PYTHON:-$KIT/.venv/bin/python} python
  [[ -n $PYTHON || -x $wanted ]] || wanted=python3
  python=$(command -v -- "$wanted") ||
    die "${PYTHON:+PYTHON=}$wanted is no program: bash common/shell/setup_venv.sh makes .venv; or set PYTHON to a Python"
  [[ $python == /* ]] || python=$PWD/$python
  printf '%s\n' "$python"
}

# quote WORD: sets QUOTED to the word as any POSIX shell reads it; bash's %q works only in bash.
quote() {
  local quote="'\\''"
  QUOTED=$1
  if [[ -z $1 || $1 == *[!A-Za-z0-9_./:=,@%+-]* ]]; then
    QUOTED=${1//\'/"$quote"}
    QUOTED="'$QUOTED'"
  fi
}

# quoted WORD...: the words as a line for any POSIX shell.
quoted() {
  local word line=''
  for word; do
    quote "$word"
    line+=" $QUOTED"
  done
  printf '%s\n' "${line:1}"
}

# folded BEGINNING WORD...: BEGINNING and the quoted words as one command for any POSIX shell, on lines of at most 100
# bytes where the words allow it; a flag stays with its value if they fit.
folded() {
  local line=$1 part width=96 # of 100: two for " \", two for the "+ " before the first line
  shift
  while (($#)); do
    quote "$1"
    part=$QUOTED
    if [[ $1 == --* && $# -gt 1 && $2 != -* ]]; then
      quote "$2"
      ((${#part} + ${#QUOTED} + 5 > width)) || { part+=" $QUOTED" && shift; }
    fi
    shift
    if ((${#line} + 1 + ${#part} > width)); then
      printf '%s \\\n' "$line"
      line="    $part"
    else
      line+=" $part"
    fi
  done
  printf '%s\n' "$line"
}

# python_path: the kit, then the caller's PYTHONPATH, whose folders may be relative to the caller's.
python_path() {
  local folder folders path=$KIT
  IFS=: read -r -d '' -a folders < <(printf '%s\0' "${PYTHONPATH:-}")
  for folder in ${folders[@]+"${folders[@]}"}; do
    [[ -z $folder ]] || path+=:$([[ $folder == /* ]] || printf '%s/' "$PWD")$folder
  done
  printf '%s\n' "$path"
}

# run WORD...: executes `python -m WORD... ARGS FLAGS`; the printed command does the same from any folder and shell. It is
# folded for people; a dry run that is piped on is one line, for programs.
# Before 3.11 Python imports from the folder it starts in, and must not import a user's folder `common`: it starts in the
# kit's folder, and common/start.py changes to KIT_CWD.
run() {
  local program name words beginning from=()
  program=$(find_python)
  words=("PYTHONPATH=$(python_path)" PYTHONSAFEPATH=1 "KIT_CWD=$PWD" "KIT_PLATFORM=$KIT_PLATFORM")
  for name in $(settings "$VENDOR/env.sh"); do words+=("$name=${!name}"); done
  words+=("$program" -m "$@" ${ARGS[@]+"${ARGS[@]}"} ${FLAGS[@]+"${FLAGS[@]}"}) # empty ones are unset before bash 4.4
  beginning="env -C $(quoted "$KIT")"
  env -C / true 2>/dev/null || beginning="cd $(quoted "$KIT") && env" # coreutils before 8.28
  if [[ $DRY_RUN == true && ! -t 1 ]]; then
    printf '%s %s\n' "$beginning" "$(quoted "${words[@]}")"
  elif [[ $DRY_RUN == true ]]; then
    folded "$beginning" "${words[@]}"
  else
    for name in "${NAMES[@]}"; do ! exported "$name" || from+=("$name"); done
    ((${#from[@]} == 0)) || say "from the environment: ${from[*]}" 2>&1 | fold -s -w 100 >&2
    printf '+ %s\n' "$(folded "$beginning" "${words[@]}")" >&2
    cd -- "$KIT" || exit
    in_users_locale "${words[@]}"
  fi
}
