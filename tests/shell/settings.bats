#!/usr/bin/env bats
# Settings from a file, what the environment sets, old names.

bats_require_minimum_version 1.5.0
load helper

setup() {
  unset PYTHONPATH
  forget_settings
  use_fake_python
  cd "$BATS_TEST_TMPDIR" || return
  SCRIPT=$KIT/nvidia/3_run_mcore_qwen.sh
}

# write LINE...: the settings file.
write() {
  printf '%s\n' "$@" >my.env
}

@test "a file sets settings, and the environment wins" {
  write '# of a run' 'DATASET_PATH="/data/a b" # two words' "export TRAIN_MODE='finetune'" 'LR=3e-5   # a rate' \
    'SAVE_CHECKPOINT_PATH=/ckpt/run#1' '' 'TP=4' $'SEQ_LENGTH=4096\r'
  printf 'LOAD_CHECKPOINT_PATH=/ckpt/start' >>my.env # without a newline
  run -7 --separate-stderr env SETTINGS=my.env TP=2 "$SCRIPT"
  [[ $(passed DATASET_PATH) == '/data/a b' && $(passed TRAIN_MODE) == finetune && $(passed LR) == 3e-5 ]]
  [[ $(passed SAVE_CHECKPOINT_PATH) == '/ckpt/run#1' && $(passed SEQ_LENGTH) == 4096 && $(passed TP) == 2 ]]
  [[ $(passed LOAD_CHECKPOINT_PATH) == /ckpt/start && $(passed SETTINGS) == '' ]]
  [[ ${stderr_lines[0]} == '3_run_mcore_qwen.sh: from the environment: TP' ]]
}

@test "every step of every vendor takes a file" {
  # shellcheck disable=SC2153 # of the helper
  for script in "${SCRIPTS[@]}"; do
    give_needed "$script" x
    env "${GIVEN[@]}" "$script" -n >expected
    mapfile -t lines < <(printf '%s\n' "${GIVEN[@]}" | grep -E "^($(declared "$script" | paste -sd '|'))=")
    write "${lines[@]}"
    diff expected <(SETTINGS=my.env "$script" -n)
  done
}

@test "a line that sets nothing, or nothing known, is refused by its number" {
  while IFS='|' read -r line message; do
    write 'LR=1e-5' "$line"
    run -2 --separate-stderr env SETTINGS=my.env "$SCRIPT"
    [[ $stderr == "3_run_mcore_qwen.sh: SETTINGS=my.env, line 2: $message (see --help)" ]]
    run -1 started
  done <<'END'
LERNING_RATE=1|LERNING_RATE is no setting of 3_run_mcore_qwen.sh
lr=1|lr is no setting of 3_run_mcore_qwen.sh
PATH=/|PATH is no setting of 3_run_mcore_qwen.sh
LR 1|'LR 1' is not NAME=value
LR = 1|'LR = 1' is not NAME=value
LR=$RATE|LR=$RATE: nothing is expanded there, write the value itself
SAVE_CHECKPOINT_PATH="`pwd`"|SAVE_CHECKPOINT_PATH=`pwd`: nothing is expanded there, write the value itself
END
  run -2 --separate-stderr env SETTINGS=missing.env "$SCRIPT"
  [[ $stderr == *'SETTINGS=missing.env is no file that can be read'* ]]
}

@test "what the environment sets is listed before the command, and nothing where it sets nothing" {
  give_needed "$SCRIPT" x
  run -7 --separate-stderr env "${GIVEN[@]}" LR=1 "$SCRIPT"
  before=${stderr%%$'\n+ '*} # on lines of 100 bytes
  [[ ${before//$'\n'/} == *': from the environment: DATASET_PATH '*' HF_MODEL_PATH LR' ]]
  write "${GIVEN[@]}"
  run -7 --separate-stderr env SETTINGS=my.env "$SCRIPT"
  [[ ${stderr_lines[0]} == '+ '* ]]
}

@test "the old names of the checkpoint folders are accepted, with a log line" {
  for vendor in "${VENDORS[@]}"; do
    script=$vendor/3_run_mcore_qwen.sh
    for old in SAVE_DIST_CHECKPOINT_PATH SAVE_TORCH_CHECKPOINT_PATH; do
      run -7 --separate-stderr env DATASET_PATH=d LOAD_CHECKPOINT_PATH=l "$old=/s" "$script"
      [[ $stderr == *": $old is the old name of SAVE_CHECKPOINT_PATH: SAVE_CHECKPOINT_PATH=/s"* ]]
      [[ $(passed SAVE_CHECKPOINT_PATH) == /s ]]
      run -2 env DATASET_PATH=d LOAD_CHECKPOINT_PATH=l SAVE_CHECKPOINT_PATH=/t "$old=/s" "$script" -n
      [[ $output == *"SAVE_CHECKPOINT_PATH=/t and $old=/s differ"* ]]
      run -0 env DATASET_PATH=d LOAD_CHECKPOINT_PATH=l SAVE_CHECKPOINT_PATH=/s "$old=/s" "$script" -n
    done
    # A script of before sets both, and training writes to the first.
    both=(SAVE_DIST_CHECKPOINT_PATH=/d SAVE_TORCH_CHECKPOINT_PATH=/t)
    run -7 --separate-stderr env "${both[@]}" DATASET_PATH=d LOAD_CHECKPOINT_PATH=l "$script"
    [[ $(passed SAVE_CHECKPOINT_PATH) == /d && $stderr == *"SAVE_TORCH_CHECKPOINT_PATH is not used"* ]]
    run -7 env "${both[@]}" TRAIN_OR_CONVERT_CKPT=convert "$script"
    [[ $(passed LOAD_CHECKPOINT_PATH) == /d && $(passed SAVE_CHECKPOINT_PATH) == /t ]]
    run -2 env "${both[@]}" TRAIN_OR_CONVERT_CKPT=convert LOAD_CHECKPOINT_PATH=/other "$script"
    [[ $output == *"LOAD_CHECKPOINT_PATH=/other and SAVE_DIST_CHECKPOINT_PATH=/d differ"* ]]
  done
}

@test "convert refuses to write to the folder that it reads, however it is spelled" {
  mkdir folder
  for vendor in "${VENDORS[@]}"; do
    for save in folder folder/ ./folder/../folder "$PWD/folder"; do
      TRAIN_OR_CONVERT_CKPT=convert LOAD_CHECKPOINT_PATH=folder SAVE_CHECKPOINT_PATH=$save run -2 \
        "$vendor/3_run_mcore_qwen.sh" -n
      [[ $output == *"are both folder: convert writes to another folder"* ]]
    done
  done
}
