#!/usr/bin/env bats
# Every step of every vendor behaves the same.

bats_require_minimum_version 1.5.0
load helper

# A tiny model, and the data that step 1 makes for it; the folder's name must be quoted wherever it is used.
setup_file() {
  forget_settings
  export PYTHONPATH=$KIT DATA="$BATS_FILE_TMPDIR/it's \"data\""
  export PYTHON=${PYTHON:-$KIT/.venv/bin/python}
  mkdir "$DATA"
  (cd "$KIT" && "$PYTHON" -c 'import sys, pathlib, tests.tiny as t; t.tiny_qwen(pathlib.Path(sys.argv[1]))' "$DATA/hf")
  for i in {1..40}; do
    printf '{"text": "Row %d: the quick brown fox jumps over the lazy dog."}\n' "$i" >>"$DATA/text.jsonl"
    printf '{"instruction": "", "input": "What is %d + 1?", "output": "%d"}\n' "$i" $((i + 1)) >>"$DATA/chat.jsonl"
  done
  export WORKERS=1 TOKENIZER_PATH="$DATA/hf"
  INPUT="$DATA/text.jsonl" OUTPUT_PREFIX="$DATA/pretrain" "$KIT/cpu/1_preprocess_pretrain.sh"
  INPUT="$DATA/chat.jsonl" OUTPUT_PREFIX="$DATA/finetune" "$KIT/cpu/1_preprocess_sft.sh"
}

setup() {
  unset PYTHONPATH
  forget_settings
  REAL_PYTHON=$PYTHON
  cd "$BATS_TEST_TMPDIR" || return
}

@test "--help works with nothing set and names every setting that the step reads, with its default" {
  use_fake_python
  for script in "${SCRIPTS[@]}"; do
    for flag in -h --help; do
      echo "$script $flag"
      run -0 --separate-stderr env -i PATH="$PATH" PYTHON="$PYTHON" "$script" "$flag"
      [[ -z $stderr && $output == *"${script##*/}"* ]]
      diff <(sed -nE 's/^  ([A-Z0-9_]+)(=.*)?  +[^ ].*/\1/p' <<<"$output" | sort) <(read_by "$script")
      diff <(sed -nE 's/^  ([A-Z0-9_]+=[^ ]+)  +[^ ].*/\1/p' <<<"$output" | sort) \
        <(defaults "$script" "${script%/*}/env.sh")
    done
  done
  run ! started
}

@test "all missing settings are reported at once, exit 2, and nothing starts" {
  use_fake_python
  for script in "${SCRIPTS[@]}"; do
    case ${script##*/} in
      1_*) missing='INPUT, OUTPUT_PREFIX, TOKENIZER_PATH' ;;
      2_*) missing='CONVERT_TYPE, LOAD_CHECKPOINT_PATH, SAVE_CHECKPOINT_PATH' ;;
      3_*) missing='DATASET_PATH, SAVE_CHECKPOINT_PATH, LOAD_CHECKPOINT_PATH or HF_MODEL_PATH' ;;
      4_*) missing=HF_MODEL_PATH ;;
      5_*) missing='HF_MODEL_PATH, INPUT or TASKS' ;;
    esac
    for flags in '' -n; do
      # shellcheck disable=SC2086 # none or one
      run -2 --separate-stderr "$script" $flags
      [[ -z $output && $stderr == "${script##*/}: set $missing (see --help)" ]]
    done
  done
  for vendor in "${VENDORS[@]}"; do
    TRAIN_OR_CONVERT_CKPT=convert run -2 "$vendor/3_run_mcore_qwen.sh"
    [[ $output == *": set LOAD_CHECKPOINT_PATH, SAVE_CHECKPOINT_PATH "* ]]
    INPUT=a TOKENIZER_PATH=b run -2 "$vendor/1_preprocess_sft.sh"
    [[ $output == *": set OUTPUT_PREFIX "* ]]
  done
  run ! started
}

@test "a run that can be resumed needs no model or weights" {
  use_fake_python
  mkdir s
  for vendor in "${VENDORS[@]}"; do
    rm -f s/latest_checkpointed_iteration.txt
    run -2 env DATASET_PATH=d SAVE_CHECKPOINT_PATH=s "$vendor/3_run_mcore_qwen.sh" -n
    echo 100 >s/latest_checkpointed_iteration.txt
    run -0 env DATASET_PATH=d SAVE_CHECKPOINT_PATH=s "$vendor/3_run_mcore_qwen.sh" -n
  done
}

@test "a dry run starts nothing and prints one line that does the same from any folder and shell" {
  use_fake_python
  mkdir "a folder" && cd "a folder"
  for script in "${SCRIPTS[@]}"; do
    give_needed "$script" "it's \"relative\" \$HOME/*"
    for flag in -n --dry-run; do
      echo "$script $flag"
      rm -f "$PYTHON.record"
      run -0 --separate-stderr env "${GIVEN[@]}" PYTHONPATH="more here" "$script" "$flag" -- --more 'a  b'
      [[ ${#lines[@]} == 1 && -z $stderr ]]
      line=$output
      run ! started
      run -7 paste_line "$line"
      mv "$PYTHON.record" pasted
      run -7 --separate-stderr env "${GIVEN[@]}" PYTHONPATH="more here" "$script" -- --more 'a  b'
      diff pasted "$PYTHON.record"
      # What is printed where it runs is the same command, folded.
      folded=$(echoed "$stderr")
      [[ $(unfolded "$folded") == "$line" && $folded != "$line" ]]
      run ! grep -vE '^.{1,100}$|^ *[^ ]+( \\)?$' <<<"+ $folded" # a longer line is one word
      rm "$PYTHON.record"
      run -7 paste_line "$folded"
      diff pasted "$PYTHON.record"
    done
  done
}

@test "the printed line of steps 1 and 3 to 5 passes Python's own check at every vendor, without its GPU" {
  for vendor in "${VENDORS[@]}"; do
    echo "$vendor"
    export TOKENIZER_PATH="$DATA/hf" HF_MODEL_PATH="$DATA/hf" OUTPUT_PREFIX="$DATA/new/a"
    INPUT="$DATA/text.jsonl" check "$vendor/1_preprocess_pretrain.sh"
    INPUT="$DATA/chat.jsonl" SEQ_LENGTH=64 check "$vendor/1_preprocess_sft.sh"
    # Transformer Engine, NVIDIA's default, is not installed where the tests run
    DATASET_PATH="$DATA/pretrain" SEQ_LENGTH=64 SAVE_CHECKPOINT_PATH="$DATA/new" \
      check "$vendor/3_run_mcore_qwen.sh" --transformer-impl local
    run -2 paste_line "$PRINTED --check --seq-length 100000" # a check that never failed would show nothing
    [[ $output == *"error: SEQ_LENGTH=100000 exceeds"* && ! -e $DATA/new ]]
    PROMPTS="$DATA/chat.jsonl" OUTPUT="$DATA/new/answers.jsonl" MAX_NEW_TOKENS=64 check "$vendor/4_chat.sh"
    run -2 paste_line "$PRINTED --check --max-new-tokens 512"
    [[ $output == *"error: MAX_NEW_TOKENS=512: the model has 512 positions"* && ! -e $DATA/new ]]
    INPUT="held_out=$DATA/chat.jsonl" OUTPUT="$DATA/new/results.json" check "$vendor/5_evaluate.sh"
  done
}

@test "fields of Megatron-Core's configs are passed from step 3's script to Python's check" {
  fields="--mcore.transformer.recompute_modules core_attn mlp --mcore.ddp.bucket_size 1000"
  # shellcheck disable=SC2086 # a word each
  run -0 --separate-stderr env TRANSFORMER_IMPL=local SEQ_LENGTH=64 DATASET_PATH="$DATA/pretrain" \
    HF_MODEL_PATH="$DATA/hf" SAVE_CHECKPOINT_PATH="$DATA/new" "$KIT/cpu/3_run_mcore_qwen.sh" --dry-run -- $fields
  line=$output
  [[ $line == *" $fields" ]]
  run -0 paste_line "$line --check"
  [[ $output == *"ddp config: bucket_size = 1000"* && $output == *"ok: the run can start" ]]
  run -2 paste_line "$line --check --mcore.ddp.bucket_sise 1"
  [[ $output == *"did you mean bucket_size"* ]]
}

@test "the printed lines of step 2, and of step 3 from what step 2 wrote, pass Python's own check at every vendor" {
  # torch_dist fits the sizes of every vendor
  env CONVERT_TYPE=huggingface-to-megatron LOAD_CHECKPOINT_PATH="$DATA/hf" SAVE_CHECKPOINT_PATH="$DATA/megatron" \
    CKPT_FORMAT=torch_dist "$KIT/cpu/2_convert_between_hf_megatron.sh"
  export DATASET_PATH="$DATA/finetune" TRAIN_MODE=finetune SEQ_LENGTH=64 SAVE_CHECKPOINT_PATH="$DATA/new"
  for vendor in "${VENDORS[@]}"; do
    echo "$vendor"
    script=$vendor/2_convert_between_hf_megatron.sh
    LOAD_CHECKPOINT_PATH="$DATA/hf" CONVERT_TYPE=huggingface-to-megatron check "$script"
    LOAD_CHECKPOINT_PATH="$DATA/megatron" CONVERT_TYPE=megatron-to-huggingface check "$script"
    LOAD_CHECKPOINT_PATH="$DATA/megatron" check "$vendor/3_run_mcore_qwen.sh" --transformer-impl local
  done
  [[ ! -e $DATA/new ]]
}

@test "every setting of the environment wins over the script's default and reaches a flag that Python knows" {
  use_fake_python
  for script in "${SCRIPTS[@]}"; do
    mapfile -t settings < <(declared "$script" | sed 's/.*/&=own &/')
    : >seen
    while read -r choice module subcommand; do
      [[ $choice != - ]] || choice=
      run -7 env "${settings[@]}" ${choice:+"$choice"} "$script"
      echo "$script $module $subcommand"
      run -0 comm -23 <(sed -nE 's/^<(--[a-z0-9-]+)>$/\1/p' "$PYTHON.record" | sort) \
        <(known_flags "$module" ${subcommand:+"$subcommand"})
      [[ -z $output ]]
      given | grep -Fx -e "$choice" -f <(printf '%s\n' "${settings[@]}") | cut -d= -f1 >>seen
    done < <(commands "$script")
    # CONVERT_TYPE chooses the subcommand and is no flag.
    diff <(declared "$script" | grep -vx CONVERT_TYPE) <(sort -u seen)
  done
}

@test "EPOCHS is 3 unless TRAIN_ITERS or EPOCHS is set" {
  use_fake_python
  for vendor in "${VENDORS[@]}"; do
    script=$vendor/3_run_mcore_qwen.sh
    give_needed "$script" x
    run -7 env "${GIVEN[@]}" "$script"
    [[ $(passed EPOCHS) == 3 && -z $(passed TRAIN_ITERS) ]]
    run -7 env "${GIVEN[@]}" EPOCHS=5 "$script"
    [[ $(passed EPOCHS) == 5 ]]
    run -7 env "${GIVEN[@]}" TRAIN_ITERS=7 "$script"
    [[ -z $(passed EPOCHS) && $(passed TRAIN_ITERS) == 7 ]]
  done
}

@test "what follows -- reaches Python last; an unknown argument before it is refused" {
  use_fake_python
  for script in "${SCRIPTS[@]}"; do
    echo "$script"
    give_needed "$script" x
    run -7 env "${GIVEN[@]}" "$script" -- --first '' -h --last "it's"
    diff <(tail -n 5 "$PYTHON.record") <(printf '<%s>\n' --first '' -h --last "it's")
    rm "$PYTHON.record"
    for argument in --tp pretrain ''; do
      run -2 --separate-stderr env "${GIVEN[@]}" "$script" -n "$argument" -- --more
      [[ -z $output && $stderr == *"unknown argument '$argument'"*NAME=value* ]]
    done
    run ! started
  done
}

@test "the exit status and the process are the command's own" {
  mkdir common && echo 'raise SystemExit("not this one")' >common/__init__.py # in the user's working directory
  for script in "$KIT"/cpu/[0-9]_*.sh; do
    give_needed "$script" /nowhere
    run -2 env "${GIVEN[@]}" "$script" # Python's own refusal
    [[ $output == *"error: "*/nowhere* ]]
  done
  use_fake_python
  for script in "${SCRIPTS[@]}"; do
    give_needed "$script" x
    env "${GIVEN[@]}" "$script" 3>&- 2>/dev/null &
    status=0 && wait $! || status=$?
    [[ $status == 7 && $(<"$PYTHON.pid") == "$!" ]] # signals reach Python, since it takes the shell's place
  done
}

@test "works from any folder, by a relative path, through links and from a kit in a folder with spaces" {
  use_fake_python
  ln -s "$KIT" kit
  for script in "${SCRIPTS[@]}"; do
    echo "$script"
    name=${script#"$KIT/"}
    give_needed "$script" x
    ln -sf "$script" linked.sh
    run -0 env "${GIVEN[@]}" "$script" -n
    expected=$output
    for path in ./linked.sh "kit/$name" "$(realpath --relative-to=. "$script")"; do
      run -0 env "${GIVEN[@]}" "$path" -n
      [[ $output == "$expected" ]]
    done
    run -0 env "${GIVEN[@]}" CDPATH="$KIT" bash "kit/$name" -n
    [[ $output == "$expected" ]]
  done
  mkdir -p "its own/common"
  cp -r "${VENDORS[@]}" "its own/"
  cp -r "$KIT/common/shell" "its own/common/"
  for script in "${SCRIPTS[@]}"; do
    give_needed "$script" x
    run -7 env "${GIVEN[@]}" "its own/${script#"$KIT/"}"
    grep -qx "PYTHONPATH=$PWD/its own" "$PYTHON.record"
  done
}

@test "every vendor has the same steps with the same settings, and no default for what is needed" {
  ((${#VENDORS[@]} >= 3 && ${#SCRIPTS[@]} == 6 * ${#VENDORS[@]}))
  for vendor in "${VENDORS[@]}"; do
    echo "$vendor"
    diff <(cd "$KIT/cpu" && ls [0-9]_*.sh) <(cd "$vendor" && ls [0-9]_*.sh)
    grep -q "^export KIT_PLATFORM=${vendor##*/} " "$vendor/env.sh"
    for script in "$vendor"/[0-9]_*.sh; do
      [[ -x $script ]]
      diff <(declared "$KIT/cpu/${script##*/}") <(declared "$script")
      [[ -n $(needed "$script") ]]
      run -1 grep -Fxf <(needed "$script") <(defaults "$script" | cut -d= -f1)
    done
  done
}

@test "the steps' settings are Python's, and so are the defaults that all vendors share" {
  # For the expert, after --.
  expert='MCORE|NUM_WORKERS|SEQUENCE_PARALLEL|CORE_ATTENTION|FUSED_PRODUCTS|CHAT_TEMPLATE_KWARGS'
  for step in 1_preprocess_pretrain:common.preprocess.PretrainSettings 1_preprocess_sft:common.preprocess.SftSettings \
    3_run_mcore_qwen:common.training.settings.TrainSettings 4_chat:common.chat.settings.ChatSettings \
    5_evaluate:common.evaluate.settings.EvaluateSettings; do
    script=${step%:*}.sh class=${step#*:}
    echo "$class"
    run -0 settings_of_python "from ${class%.*} import ${class##*.} as kind"
    diff <(grep -vwE "$expert" <<<"$output" | sort) <(declared "$KIT/cpu/$script")
    shared=$(comm -12 <(defaults "$KIT/cpu/$script") <(defaults "$KIT/nvidia/$script") |
      comm -12 - <(defaults "$KIT/metax/$script"))
    [[ -n $shared ]]
    mapfile -t shared <<<"$shared"
    run -0 settings_of_python "from ${class%.*} import ${class##*.} as kind" "${shared[@]}"
  done
}

# settings_of_python IMPORT [NAME=DEFAULT...]: the settings of a class, a line each; fails where its default is another.
settings_of_python() {
  (cd "$KIT" && "$REAL_PYTHON" - "${@:2}" <<END)
import argparse, dataclasses, sys
$1
from common.settings import add_options
fields = {field.name.upper(): field for field in dataclasses.fields(kind)}
parser = argparse.ArgumentParser()
add_options(parser, kind)
required = [f"--{f.name.replace('_', '-')}=x" for f in fields.values() if f.default is dataclasses.MISSING]
for name, text in (word.split("=") for word in sys.argv[1:]):
    flag = "--" + name.lower().replace("_", "-")
    value = getattr(parser.parse_args([*required, flag, text]), name.lower())
    assert value == fields[name].default, f"{name}={text}, but Python's default is {fields[name].default}"
print(*fields, sep="\n")
END
}

@test "the scripts' layers and checkpoint format are those of the vendor's platform" {
  for vendor in "${VENDORS[@]}"; do
    (cd "$KIT" && KIT_PLATFORM=${vendor##*/} "$REAL_PYTHON" -c 'from common.platforms import current
print(f"TRANSFORMER_IMPL={current().transformer_impl}", f"CKPT_FORMAT={current().checkpoint_format}", sep="\n")') >facts
    diff <(defaults "$vendor/3_run_mcore_qwen.sh" | grep -E '^(TRANSFORMER_IMPL|CKPT_FORMAT)=') <(sort facts)
    grep -Fx "$(head -n 1 facts)" <(defaults "$vendor/2_convert_between_hf_megatron.sh")
    # The sizes that a checkpoint is written at and trained at must be the same.
    diff <(defaults "$vendor/2_convert_between_hf_megatron.sh" | grep -E '^V?[TP]P=') \
      <(defaults "$vendor/3_run_mcore_qwen.sh" | grep -E '^V?[TP]P=')
  done
}

@test "an unknown value of a setting with fixed choices is refused with the known ones" {
  for vendor in "${VENDORS[@]}"; do
    script=$vendor/2_convert_between_hf_megatron.sh
    give_needed "$script" x
    run -2 env "${GIVEN[@]}" CONVERT_TYPE=hf "$script" -n
    [[ $output == *"CONVERT_TYPE=hf is not known: set it to huggingface-to-megatron or megatron-to-huggingface"* ]]
    script=$vendor/3_run_mcore_qwen.sh
    give_needed "$script" x
    run -2 env "${GIVEN[@]}" TRAIN_OR_CONVERT_CKPT=trian "$script" -n
    [[ $output == *"TRAIN_OR_CONVERT_CKPT=trian is not known: set it to train or convert"* ]]
  done
}
