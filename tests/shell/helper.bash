# shellcheck shell=bash
#
# Helpers of the tests of the steps: every script of every vendor, the settings that it reads, a recording Python.

KIT=$(cd -- "$BATS_TEST_DIRNAME/../.." && pwd)
# shellcheck disable=SC2034 # the tests read it
SCRIPTS=("$KIT"/*/[0-9]_*.sh)
VENDORS=("$KIT"/*/env.sh)
VENDORS=("${VENDORS[@]%/env.sh}")

# body SCRIPT: the file of common/shell/ that it ends with.
body() {
  sed -n "s|^source \"\$VENDOR/../\(.*\)\" \"\$@\"|$KIT/\1|p" "$1"
}

# declared FILE...: the settings with a default in these files, one a line.
declared() {
  sed -n 's/^: "${\([A-Z0-9_]*\):=.*/\1/p' "$@" | sort
}

# defaults FILE...: the settings with a default that is not empty, as NAME=default.
defaults() {
  sed -n 's/^: "${\([A-Z0-9_]*\):=\([^}]\{1,\}\)}".*/\1=\2/p' "$@" | sort
}

# needed FILE: the settings under its heading "Needed".
needed() {
  sed -n '/^# Needed/,/^$/p' "$1" | declared
}

# read_by SCRIPT: every setting that it, its machine's file, its body and the library read.
read_by() {
  local body
  body=$(body "$1")
  {
    declared "$1" "${1%/*}/env.sh" "$body" "$KIT/common/shell/lib.sh"
    sed -nE 's/^ *(need|flags|one_of|old_name) //p' "$body" | grep -oE '\<[A-Z][A-Z0-9_]+\>' | grep -v '^NAMES$'
  } | sort -u
}

# forget_settings: unsets what the caller's environment sets for the steps, but for PYTHON and the machine's own.
forget_settings() {
  # shellcheck disable=SC2046 # one word a name
  unset $(declared "${SCRIPTS[@]}" "$KIT"/common/shell/train.sh)
}

# commands SCRIPT: what it can run, a line each: the setting that chooses it (or -), then the module and subcommand.
commands() {
  case ${1##*/} in
    1_preprocess_pretrain.sh) echo '- common.preprocess pretrain' ;;
    1_preprocess_sft.sh) echo '- common.preprocess sft' ;;
    2_*)
      echo 'CONVERT_TYPE=huggingface-to-megatron common.convert hf-to-megatron'
      echo 'CONVERT_TYPE=megatron-to-huggingface common.convert megatron-to-hf'
      ;;
    3_*) printf 'TRAIN_OR_CONVERT_CKPT=%s common.train\n' train convert ;;
    4_*) echo '- common.chat' ;;
    5_*) echo '- common.evaluate' ;;
  esac
}

# known_flags MODULE [SUBCOMMAND]: the flags of a command, as its --help names them, a line each.
known_flags() {
  local kept="$BATS_FILE_TMPDIR/flags $*"
  [[ -e $kept ]] ||
    (cd -- "$KIT" && "$REAL_PYTHON" -m "$@" --help) | grep -oE -e '--[a-z0-9-]+' | sort -u >"$kept"
  cat "$kept"
}

# give_needed SCRIPT FOLDER: sets GIVEN to what the step must have, as NAME=FOLDER/NAME.
give_needed() {
  local name
  GIVEN=(HF_MODEL_PATH="$2/HF_MODEL_PATH")
  for name in $(needed "$1"); do GIVEN+=("$name=$2/$name"); done
  [[ $1 != */2_* ]] || GIVEN+=(CONVERT_TYPE=huggingface-to-megatron)
}

# use_fake_python: from here on PYTHON writes its process, folder, environment and arguments beside itself, and exits 7.
use_fake_python() {
  local names
  names=$(declared "$KIT"/*/env.sh | sort -u | paste -sd '|')
  export PYTHON="$BATS_TEST_TMPDIR/bin/python"
  mkdir -p "${PYTHON%/*}"
  cat >"$PYTHON" <<END
#!/usr/bin/env bash
printf '%s\n' "\$\$" >"\$0.pid"
printf 'LC_ALL=%s\n' "\${LC_ALL-<unset>}" >"\$0.locale"
{ pwd; env | grep -E '^(PYTHONPATH|PYTHONSAFEPATH|KIT_PLATFORM|KIT_CWD|$names)=' | sort; printf '<%s>\n' "\$@"; } >"\$0.record"
exit 7
END
  chmod +x "$PYTHON"
}

# Whether the recording Python has run.
started() {
  [[ -e $PYTHON.record ]]
}

# given: Python's arguments, as NAME=value for each flag with its value.
given() {
  sed -n 's/^<\(.*\)>$/\1/p' "$PYTHON.record" | awk '
    name != "" { print name "=" $0; name = ""; next }
    /^--[a-z0-9-]+$/ { name = toupper(substr($0, 3)); gsub("-", "_", name) }
  '
}

# passed NAME: the value that Python got for the setting NAME.
passed() {
  given | sed -n "s/^$1=//p"
}

# echoed STDERR: the command that a script prints before it runs it, as it is folded.
echoed() {
  sed -n '/^+ /,$p' <<<"$1" | sed '1s/^+ //'
}

# unfolded COMMAND: the command on one line.
unfolded() {
  printf '%s\n' "${1//$' \\\n    '/ }"
}

# paste_line LINE: runs LINE as a user would, in another folder, in a new sh without the settings.
paste_line() {
  (cd / && env -i PATH="$PATH" HOME="$HOME" sh -c "$1")
}

# check SCRIPT [FLAG ...]: fails unless the line that its dry run prints, with the flags after it, is accepted by Python
# with --check; sets PRINTED to it. For Python a CPU is the vendor's device: one that is not there is refused.
# shellcheck disable=SC2154 # `run` sets output
check() {
  run -0 --separate-stderr "$1" -n
  PRINTED="export KIT_TEST_ON_CPU=true; $output ${*:2}"
  run -0 --separate-stderr paste_line "$PRINTED --check"
  [[ $output == ok:* ]]
}
