"""flags.txt: every setting in it is one of the scripts, every rule exists, and values are converted as it says."""

import re
from pathlib import Path

import pytest

from common.adopt.adoption import SCRIPTS, SECTIONS, adopt
from common.adopt.command_line import find_steps, started_script
from common.adopt.draft import CHANGED, HERE, PROBLEM, Draft
from common.adopt.shell import read_script
from common.adopt.table import read_table
from common.adopt.values import RULES
from common.model.shape.config import QwenConfig
from common.settings import declared
from tests.tiny import tiny_qwen

# What a flag of each step must have beside the flags of a case, so that nothing else is a problem.
WHOLE = (
    "--data-path /d --load /l --save /s --seq-length 64 --micro-batch-size 1 --global-batch-size 8 --train-iters 5"
    " --lr 1 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear"
    " --attention-dropout 0 --hidden-dropout 0 --bf16"
)


def draft_of(flags: str, *, vendor: str = "nvidia", model: Path | None = None, launcher: str = "") -> Draft:
    """What becomes of one command of step 3."""
    script = read_script(f"torchrun --nproc_per_node 8 {launcher} pretrain_gpt.py {flags}")
    return adopt(find_steps(script)[0][0], script, vendor, model)


def remarks(draft: Draft, kind: str, part: str) -> list[str]:
    return [each.text for each in draft.remarks if each.kind == kind and part in each.text]


@pytest.mark.parametrize("section", ["launcher", "train", "preprocess", "convert"])
def test_every_setting_and_rule_of_the_table_exists(section: str) -> None:
    scripts = [SCRIPTS[step] for step in SCRIPTS if SECTIONS.get(step, step) == section] or [SCRIPTS["train"]]
    known = declared(*(f"nvidia/{name}" for name in scripts))
    rows = read_table()[section].values()
    assert {row.setting for row in rows if row.setting} <= known
    assert {row.rule for row in rows} <= {*RULES, "shape"}
    fields = {row.argument for row in rows if row.rule == "shape"}
    assert fields <= QwenConfig.__dataclass_fields__.keys()
    silent = [row.name for row in rows if row.rule in ("here", "refuse", "keep") and not row.note]
    assert not silent, "a flag that sets nothing says why"
    assert all(row.name == row.name.lower().replace("_", "-") for row in rows)


def test_a_whole_command_has_no_problem_and_one_remark_or_setting_for_each_flag() -> None:
    draft = draft_of(WHOLE)
    assert remarks(draft, PROBLEM, "") == []
    for flag in re.findall(r"--[a-z0-9-]+", WHOLE):
        named = [why for _, why in draft.settings.values() if why.split(" ")[0] == flag]
        assert named or remarks(draft, HERE, f"{flag} ") or remarks(draft, HERE, f"{flag}:"), flag


@pytest.mark.parametrize(
    ("flags", "setting", "value"),
    [
        ("--tensor_model_parallel_size=4", "TP", "4"),
        ("--data-path 0.7 /a_text_document 0.3 /b", "DATASET_PATH", "0.7 /a 0.3 /b"),
        ("--num-layers 48 --pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 3", "VPP", "4"),
        ("--train-samples 1000", "TRAIN_ITERS", "125"),
        ("--train-tokens 1e6", "TRAIN_ITERS", "1953"),
        ("--lr-warmup-samples 80", "LR_WARMUP_ITERS", "10"),
        ("--lr-warmup-fraction .1", "LR_WARMUP_FRACTION", "0.1"),
        ("--lr-warmup-fraction .1 --lr-decay-iters 4000", "LR_WARMUP_ITERS", "400"),
        ("--profile --profile-step-start 4 --profile-step-end 6", "PROFILE", "5-6"),
        ("--profile --profile-ranks 0 8", "PROFILE_RANKS", "0,8"),
        ("--record-memory-history", "MEMORY_SNAPSHOT", "true"),
        ("--lr-decay-style inverse-square-root", "LR_DECAY_STYLE", "inverse-square-root"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 2", "LR_WSD_DECAY_ITERS", "2"),
        ("--lr-decay-style WSD --lr-wsd-decay-samples 24", "LR_WSD_DECAY_ITERS", "3"),
        ("--lr-decay-style WSD --lr-wsd-decay-style linear", "LR_WSD_DECAY_STYLE", "linear"),
        ("--recompute-granularity full --recompute-method block --recompute-num-layers 2", "RECOMPUTE_NUM_LAYERS", "2"),
        ("--recompute-activations", "RECOMPUTE", "selective"),
        ("--reset-attention-mask", "RESET_ATTENTION", "true"),
        ("--train-mode finetune --reset-position-ids", "PACKING", "true"),
        ("--optimizer-cpu-offload", "OPTIMIZER_STATE", "cpu"),
        ("--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16", "OPTIMIZER_STATE", "bf16"),
        ("--optimizer-cpu-offload --exp-avg-dtype fp32", "OPTIMIZER_STATE", "cpu"),
        ("--optimizer-cpu-offload --exp-avg-dtype bf16", "OPTIMIZER_STATE", "cpu_bf16"),
        ("--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16 --optimizer hybridadam", "OPTIMIZER_STATE", "cpu_bf16"),
        ("--fp8-format hybrid", "FP8_FORMAT", "hybrid"),
        ("--no-save-optim", "SAVE_OPTIMIZER", "false"),
        ("--no-load-optim --no-load-rng", "IS_INITIAL_RUN", "auto"),
        ("--ckpt-convert-format torch --ckpt-convert-save /t", "SAVE_CHECKPOINT_PATH", "/t"),
        ("--fp16", "PRECISION", "bf16"),
        ("", "LR_DECAY_STYLE", "linear"),
        ("", "MIN_LR", "0.0"),
        ("", "TP", "1"),
    ],
)
def test_a_flag_becomes_a_setting(flags: str, setting: str, value: str) -> None:
    assert draft_of(f"{WHOLE} {flags}").settings[setting][0] == value


def test_defaults_of_megatron_are_written_only_where_the_script_has_others() -> None:
    settings = draft_of(WHOLE).settings
    assert "ADAM_BETA1" not in settings and "CLIP_GRAD" not in settings  # the same here
    theirs = {"ADAM_BETA2": "0.999", "WEIGHT_DECAY": "0.01", "MIN_LR": "0.0", "LR_WARMUP_ITERS": "0"}
    assert {name: settings[name][0] for name in theirs} == theirs
    assert settings["EVAL_ITERS"] == ("100", "--eval-iters's default in the old program")


@pytest.mark.parametrize(
    ("flags", "kind", "text"),
    [
        ("--num-experts 8", PROBLEM, "no mixture of experts"),
        ("--attention-dropout 0.1", PROBLEM, "--attention-dropout 0.1: no dropout here"),
        ("--normalization LayerNorm", PROBLEM, "another model was trained"),
        ("--rampup-batch-size 1 2 3", PROBLEM, "--rampup-batch-size 1 2 3: GLOBAL_BATCH_SIZE is the same"),
        ("--lr-decay-iters 3", PROBLEM, "over all TRAIN_ITERS=5 steps here, not over 3"),
        ("--lr-decay-style WSD", PROBLEM, "LR_DECAY_STYLE=WSD needs the length of its decay"),
        ("--profile --profile-step-end 9", PROBLEM, "its steps are 10 to 9: set PROFILE yourself"),
        ("--profile", CHANGED, "nsys is not started"),
        ("--lr-decay-style step", PROBLEM, "LR_DECAY_STYLE is one of cosine, linear, constant"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 2", CHANGED, "the last step has MIN_LR"),
        ("--lr-wsd-decay-iters 2", HERE, "no effect without --lr-decay-style WSD"),
        ("--recompute-num-layer 2", PROBLEM, "is it --recompute-num-layers?"),
        ("--no-such-flag", PROBLEM, "--no-such-flag: this flag is not known here"),
        ("--tensor-model-parallel-size two", PROBLEM, "no whole number: set TP"),
        ("--tensor-model-parallel-size $TP", PROBLEM, "--tensor-model-parallel-size $TP: its value is known only"),
        ("--bf16 $MORE", PROBLEM, "--bf16 $MORE: the flag has no value"),
        ("--lr 1 $MORE", PROBLEM, "$MORE: a word that belongs to no flag"),
        ("--tensor-model-parallel-size 3", PROBLEM, "step 3 refuses these settings together"),
        ("--ckpt-format zarr", PROBLEM, "CKPT_FORMAT is one of torch_dist, torch"),
        ("--dataset JSON-SFT", PROBLEM, "1_preprocess_sft.sh"),
        ("--no-save-optim", PROBLEM, "can never be resumed"),
        ("--wandb-exp-name 'a$b'", PROBLEM, "expands nothing"),
        ("--data-path /a /b", PROBLEM, "write DATASET_PATH with weights"),
        ("--split 90,9,1", CHANGED, "third share is not used"),
        ("--lr 2", CHANGED, "--lr 1: given again: the last one, 2,"),
        ("--no-load-optim", CHANGED, "takes weights only at the first start"),
        ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", CHANGED, "all are recomp"),
        ("--train-mode finetune", CHANGED, "ROLES=alpaca"),
        ("--train-mode finetune", CHANGED, "LOSS_ON=turn"),
        ("--train-mode finetune", CHANGED, "mean over the supervised tokens"),
        ("--save /l", CHANGED, "resumes from this folder by itself"),
        ("--sequence-parallel", HERE, "always with TP above 1"),
    ],
)  # fmt: skip
def test_a_flag_is_named_with_its_value_and_what_happens(flags: str, kind: str, text: str) -> None:
    assert remarks(draft_of(f"{WHOLE} {flags}"), kind, text)


def test_metax_gets_what_its_scripts_can_do() -> None:
    draft = draft_of(f"{WHOLE} --transformer-impl transformer_engine --async-save", vendor="metax")
    assert not {"TRANSFORMER_IMPL", "ASYNC_SAVE"} & draft.settings.keys()
    assert remarks(draft, CHANGED, "no Transformer Engine in metax/")
    assert remarks(draft, PROBLEM, "CKPT_FORMAT=torch_dist: ASYNC_SAVE stays false")
    assert draft.settings["RECOMPUTE"][0] == "none"  # the script's default is selective


def test_global_batch_size_is_a_micro_batch_of_each_rank_where_it_is_not_given() -> None:
    draft = draft_of(WHOLE.replace("--global-batch-size 8", "--tensor-model-parallel-size 2"), launcher="--nnodes=2")
    assert draft.settings["GLOBAL_BATCH_SIZE"][0] == "8" and draft.settings["NNODES"][0] == "2"


SHAPE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2"
    " --add-qkv-bias"
)


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        ("--norm-epsilon 1e-6 --rotary-base 1000000", []),
        ("--norm-epsilon 1e-5 --rotary-base 1000000", ["1e-5: config.json has rms_norm_eps=1e-06, not 1e-05"]),
        ("--norm-epsilon 1e-6", ["10000 (the old program's default): config.json has rope_theta=1000000"]),
        ("--norm-epsilon 1e-6 --rotary-base 1e6 --untie-embeddings-and-output-weights",
         ["config.json has tie_word_embeddings=true, not false"]),
        ("--norm-epsilon 1e-6 --rotary-base 1e6 --vocab-size 500", ["config.json has vocab_size=512, not 500"]),
        ("--norm-epsilon 1e-6 --rotary-base 1e6 --hidden-size 65", ["config.json has hidden_size=64, not 65"]),
        ("--norm-epsilon 1e-6 --rotary-base 1e6 --seq-length 1024", ["SEQ_LENGTH=1024: config.json allows 512"]),
        ("--norm-epsilon 1e-6 --rotary-base 1e6 --pipeline-model-parallel-size 8", ["step 3 refuses this layout"]),
        ("--norm-epsilon 1e-6 --rotary-base 1e6 --tensor-model-parallel-size 4", ["num_key_value_heads=2"]),
    ],
)  # fmt: skip
def test_shape_flags_are_compared_with_config_json(tmp_path: Path, flags: str, wrong: list[str]) -> None:
    draft = draft_of(f"{WHOLE} {SHAPE} {flags}", model=tiny_qwen(tmp_path / "hf"))
    found = remarks(draft, PROBLEM, "")
    assert len(found) == len(wrong) and all(remarks(draft, PROBLEM, each) for each in wrong), found


def test_missing_bias_and_groups_are_named(tmp_path: Path) -> None:
    flags = "--norm-epsilon 1e-6 --rotary-base 1e6 --num-attention-heads 4"
    draft = draft_of(f"{WHOLE} {flags}", model=tiny_qwen(tmp_path / "hf"))
    assert remarks(draft, PROBLEM, "config.json has qkv_bias=true, not false")
    assert remarks(draft, PROBLEM, "without --group-query-attention")


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("torchrun --nproc_per_node 1 /x/hf2mcore_qwen2_dense_and_moe_gqa.py --load a --save b", "convert"),
        ("python /x/build_idxmap_sft_dataset.py --input a --output-prefix b", "preprocess_sft"),
        ("python /x/preprocess_data_megatron.py --input a --output-prefix b", "preprocess_pretrain"),
        ("srun -l bash -c 'torchrun --nnodes 2 pretrain_gpt.py --lr 1'", "train"),
        ("python -u -m torch.distributed.launch --nproc_per_node 2 pretrain_qwen.py --lr 1", "train"),
    ],
)
def test_programs_are_recognized(command: str, kind: str) -> None:
    assert [step.kind for step in find_steps(read_script(command))[0]] == [kind]


def test_other_commands_are_no_steps_and_started_scripts_are_seen() -> None:
    steps, others = find_steps(
        read_script("echo pretrain_gpt.py\nmkdir x\nsh run.sh dsw 7B\nsource env.sh\npython plot.py")
    )
    assert not steps and len(others) == 5
    assert [started_script(command) for command in others] == [None, None, "sh run.sh dsw 7B", "source env.sh", None]
