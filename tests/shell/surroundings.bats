#!/usr/bin/env bats
# Whatever the locale, the shell, the folder and the Python, the scripts do the same or say what is wrong.

bats_require_minimum_version 1.5.0
load helper

# A locale of each kind that a user may have; what a script reads of itself is UTF-8.
LOCALES=(zh_CN.GBK zh_CN.GB18030 zh_TW.BIG5 ja_JP.EUC-JP tr_TR.UTF-8 zh_CN.UTF-8)

setup_file() {
  local name
  export LOCPATH=$BATS_FILE_TMPDIR
  # localedef exits 1 for a charmap that is no superset of ASCII, and makes the locale.
  for name in zh_CN.GBK zh_CN.GB18030 zh_TW.BIG5 ja_JP.EUC-JP tr_TR.UTF-8 zh_CN.UTF-8; do
    localedef -i "${name%.*}" -f "${name#*.}" "$LOCPATH/$name" 2>/dev/null || true
    [[ $(LC_ALL=$name locale charmap) == "${name#*.}" ]]
  done
}

setup() {
  unset PYTHONPATH LC_ALL
  forget_settings
  cd "$BATS_TEST_TMPDIR" || return
}

@test "a script prints and does the same in every locale, and Python gets the user's" {
  use_fake_python
  for script in "${SCRIPTS[@]}" "$KIT"/cpu/{doctor,quickstart}.sh; do
    give_needed "$script" x
    [[ $script == */[0-9]_* ]] || unset 'GIVEN[0]' # HF_MODEL_PATH, which the quickstart takes with INPUT
    env "${GIVEN[@]}" LC_ALL=C "$script" -n >dry
    LC_ALL=C "$script" --help >help
    for name in "${LOCALES[@]}" POSIX ''; do
      echo "$script $name"
      diff dry <(env "${GIVEN[@]}" LC_ALL="$name" "$script" -n)
      [[ $script == "$KIT"/cpu/* ]] || continue
      diff help <(LC_ALL=$name "$script" --help)
      run -7 --separate-stderr env "${GIVEN[@]}" LC_ALL="$name" "$script"
      [[ $(unfolded "$(echoed "$stderr")") == "$(<dry)" ]]
      run -0 grep -ax "LC_ALL=${name:-<unset>}" "$PYTHON.locale"
    done
  done
  grep -q 随机种子 help
}

@test "a name that is invalid in the locale is passed on unchanged" {
  use_fake_python
  name=$(printf 'it\xca\xfd\xbe\xdd|\x95\x5c &')
  for locale in "${LOCALES[@]}" C; do
    echo "$locale"
    run -0 --separate-stderr env LC_ALL="$locale" INPUT="$name" OUTPUT_PREFIX=b TOKENIZER_PATH=c \
      "$KIT/cpu/1_preprocess_sft.sh" -n
    run -7 paste_line "$output"
    grep -aqFx "<$name>" "$PYTHON.record"
  done
}

@test "sh is refused in favour of bash, and bash in the mode of sh works" {
  use_fake_python
  for script in "${SCRIPTS[@]}" "$KIT"/*/doctor.sh "$KIT/cpu/quickstart.sh" "$KIT/nvidia/setup.sh" \
    "$KIT/common/shell/setup_venv.sh"; do
    run -2 dash "$script"
    [[ ${#lines[@]} == 1 && $output == *"run it so"*": bash $script" ]]
    run -0 bash --posix "$script" --help
  done
  give_needed "$KIT/cpu/3_run_mcore_qwen.sh" x
  run -7 env "${GIVEN[@]}" bash --posix "$KIT/cpu/3_run_mcore_qwen.sh"
}

# old_bash VERSION: makes ./kit, whose scripts take the bash that runs them for one of that version.
old_bash() {
  rm -rf kit && mkdir -p kit/common
  cp -r "$KIT/cpu" kit/
  cp -r "$KIT/common/shell" kit/common/
  sed -i "s/BASH_VERSINFO\[/OLD_VERSINFO[/g; 1a OLD_VERSINFO=($1)" kit/common/shell/lib.sh
}

@test "a bash before 4.2 is refused by name" {
  use_fake_python
  give_needed "$KIT/cpu/1_preprocess_sft.sh" x
  for version in '3 2' '4 1'; do
    old_bash "$version"
    run -2 env "${GIVEN[@]}" kit/cpu/1_preprocess_sft.sh -n
    [[ ${#lines[@]} == 1 && $output == *"is too old: run it with bash 4.2 or later" ]]
  done
  for version in '4 2' '5 0'; do
    old_bash "$version"
    run -0 env "${GIVEN[@]}" kit/cpu/1_preprocess_sft.sh -n
  done
}

@test "coreutils whose env lacks -C get a line that changes the folder first" {
  use_fake_python
  mkdir old
  cat >old/env <<END
#!/bin/sh
case \$1 in -C) exit 125 ;; esac
exec $(type -P env) "\$@"
END
  chmod +x old/env
  give_needed "$KIT/cpu/1_preprocess_sft.sh" x
  export PATH=$PWD/old:$PATH
  run -0 env "${GIVEN[@]}" "$KIT/cpu/1_preprocess_sft.sh" -n
  [[ $output == "cd $KIT && env PYTHONPATH=$KIT "* ]]
  run -7 paste_line "$output"
  run -7 --separate-stderr env "${GIVEN[@]}" "$KIT/cpu/1_preprocess_sft.sh"
  grep -qx "KIT_CWD=$PWD" "$PYTHON.record"
}

@test "the caller's PYTHONPATH keeps its meaning in the kit's folder, and an empty part of it names no folder" {
  use_fake_python
  run -7 env PYTHONPATH=':a folder::/b:*:' "$KIT/cpu/doctor.sh"
  grep -Fqx "PYTHONPATH=$KIT:$PWD/a folder:/b:$PWD/*" "$PYTHON.record"
}

@test "without .venv and python3 a step names the remedy" {
  mkdir -p bin kit/common
  cp -r "$KIT/cpu" kit/ && cp -r "$KIT/common/shell" kit/common/
  for program in bash env sed awk dirname realpath; do ln -s "$(type -P "$program")" bin/; done
  run -2 env PATH="$PWD/bin" PYTHON= kit/cpu/doctor.sh
  [[ ${#lines[@]} == 1 && $output == *"python3 is no program: bash common/shell/setup_venv.sh makes .venv"* ]]
}

@test "a Python that is not executable is refused by name" {
  for script in "${SCRIPTS[@]}"; do
    give_needed "$script" x
    run -2 env "${GIVEN[@]}" PYTHON=/nowhere/python "$script" -n
    [[ $output == *"PYTHON=/nowhere/python is no program"* ]]
  done
}

@test "every vendor has a doctor, which passes on its flags and its exit status" {
  use_fake_python
  for vendor in "${VENDORS[@]}"; do
    script=$vendor/doctor.sh
    [[ -x $script ]]
    run -0 --separate-stderr "$script" --help
    [[ -z $stderr && $output == *"--no-device"* && $output == *"$(declared "$vendor/env.sh" | head -n 1)"* ]]
    run -7 "$script" -- --json --no-device
    diff <(tail -n 4 "$PYTHON.record") <(printf '<%s>\n' -m common.doctor --json --no-device)
    grep -qx "KIT_PLATFORM=${vendor##*/}" "$PYTHON.record"
  done
}
