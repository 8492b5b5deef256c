"""An old command as a draft of one step's settings: every flag, by the table, then what holds for the whole."""

import argparse
import contextlib
import difflib
import io
import re
from pathlib import Path

from common.adopt.command_line import Flag, Step
from common.adopt.draft import CHANGED, FIELDS, PROBLEM, Draft
from common.adopt.meaning import explain
from common.adopt.shape import base_vocabulary, check_groups, check_layout, compare
from common.adopt.shell import Script
from common.adopt.table import MISSING, NOTHING, Row, read_table
from common.adopt.values import RULES
from common.errors import KitError
from common.model.shape.config import load_config
from common.settings import add_options, from_namespace
from common.start import KIT
from common.training.settings import TrainSettings

SCRIPTS = {
    "train": "3_run_mcore_qwen.sh", "convert": "2_convert_between_hf_megatron.sh",
    "preprocess_sft": "1_preprocess_sft.sh", "preprocess_pretrain": "1_preprocess_pretrain.sh",
}  # fmt: skip
SECTIONS = {"preprocess_sft": "preprocess", "preprocess_pretrain": "preprocess"}
UNKNOWN_TOO = ("port", "tensorboard", "on")  # rules that do not need the value
DECLARED = re.compile(r'^: "\$\{([A-Z0-9_]+):=(.*)\}"', re.M)


def adopt(step: Step, script: Script, vendor: str, hf_model_path: Path | None) -> Draft:
    """The settings and remarks of a step for the scripts of `vendor`."""
    defaults = dict(DECLARED.findall((KIT / vendor / SCRIPTS[step.kind]).read_text(encoding="utf-8")))
    qwen = load_config(hf_model_path) if hf_model_path else None
    draft = Draft(step, script.variables, vendor, defaults, qwen)
    vocabulary = base_vocabulary(hf_model_path) if hf_model_path else None
    rows = dict(read_table()[SECTIONS.get(step.kind, step.kind)])
    if step.kind == "convert":  # the old converters take all flags of a model, too
        rows = {**{name: row for name, row in read_table()["train"].items() if not row.setting}, **rows}
    for name, row in rows.items():
        flag = step.flags.get(name)
        if flag is None and row.default == MISSING and (step.kind != "convert" or row.setting):
            draft.note(PROBLEM, Flag(name, ("not given",), 1), row.note)
        elif flag is None and row.default not in (NOTHING, MISSING) and step.kind != "convert":
            flag = Flag(name, (row.default,), 0)
        if flag is not None and (row.rule in UNKNOWN_TOO or draft.is_known(flag)):
            _apply(draft, row, flag, vocabulary)
    for name, row in read_table()["launcher"].items() if step.kind == "train" else ():
        if (flag := step.launcher.get(name)) and (row.rule in UNKNOWN_TOO or draft.is_known(flag)):
            _apply(draft, row, flag, None)
    _name_unknown(draft, rows)
    if step.kind == "train":
        _finish_training(draft, hf_model_path)
    elif step.kind == "convert":
        _finish_conversion(draft)
    explain(draft)
    return draft


def _apply(draft: Draft, row: Row, flag: Flag, vocabulary: int | None) -> None:
    if row.is_changed and (flag.line or draft.defaults.get(row.setting) != flag.value):
        draft.note(CHANGED, flag, row.text(flag.value))
    if row.rule == "shape":
        compare(draft, row, flag, vocabulary)
    else:
        RULES[row.rule](draft, row, flag)


def _name_unknown(draft: Draft, rows: dict[str, Row]) -> None:
    """Problems for flags that the table lacks, stray words, and remarks on flags that are given again."""
    step = draft.step
    known = {**rows, **(read_table()["launcher"] if step.kind == "train" else {})}
    launcher = step.launcher if step.kind == "train" else {}
    for flag in (*step.flags.values(), *launcher.values()):
        if flag.name not in known:
            near = difflib.get_close_matches(flag.name, known, 1)
            draft.note(
                PROBLEM,
                flag,
                "this flag is not known here" + (f": is it {near[0]}?" if near else ": nothing stands for it"),
            )
    for word in step.stray:
        draft.say(PROBLEM, f"{draft.variables.shown(word)}: a word that belongs to no flag, or is known only in a run:"
                  " give --args or --set, or leave it out")  # fmt: skip
    for flag in step.repeated:
        last = step.flags[flag.name]
        if last.words != flag.words:
            draft.note(CHANGED, flag, f"given again: the last one, {last.value}, is what the old program took")


def _finish_training(draft: Draft, hf_model_path: Path | None) -> None:
    """What follows from several flags, or from none."""
    step = draft.step
    if not {"--bf16", "--fp16", "--fp32"} & step.flags.keys():
        draft.set("PRECISION", "fp32", Flag("--bf16", ("false",), 0))
    if not {"--recompute-activations", "--recompute-granularity"} & step.flags.keys():
        draft.set("RECOMPUTE", "none", Flag("--recompute-granularity", ("none",), 0))
    if draft.get("TRAIN_MODE") == "finetune" and "PACKING" not in draft.settings:
        draft.set("PACKING", "false", Flag("--reset-attention-mask", (), 0))
    if "GPUS" not in draft.settings and not step.launcher.get("--nproc-per-node"):
        draft.say(
            CHANGED, f"GPUS={draft.defaults['GPUS']} is the script's own: the old command names no --nproc-per-node"
        )
    _batch(draft)
    if not {"--train-iters", "--train-samples", "--train-tokens"} & step.flags.keys():
        draft.say(PROBLEM, "the old command names no length: EPOCHS=3 is the default here; set EPOCHS or TRAIN_ITERS")
    _start(draft, hf_model_path)
    if draft.qwen:
        check_groups(draft, draft.qwen, step.flags)
        if not draft.get("PIPELINE_LAYERS"):
            check_layout(draft, draft.qwen)
    if draft.get("ASYNC_SAVE") == "true" and draft.get("CKPT_FORMAT") != "torch_dist":
        draft.settings.pop("ASYNC_SAVE")
        draft.say(PROBLEM, "--async-save: it needs CKPT_FORMAT=torch_dist: ASYNC_SAVE stays false")
    if (error := refusal(draft)) is not None:
        draft.say(PROBLEM, f"step 3 refuses these settings together: {error}")


def _batch(draft: Draft) -> None:
    """GLOBAL_BATCH_SIZE where the old command leaves it to Megatron: one micro-batch on each data parallel rank."""
    if "--global-batch-size" in draft.step.flags:
        return
    gpus, nodes, micro = (draft.number(name) for name in ("GPUS", "NNODES", "MICRO_BATCH_SIZE"))
    parts = [draft.number(name) or 1 for name in ("TP", "PP", "CP")]
    model = parts[0] * parts[1] * parts[2]
    if not (gpus and nodes and micro) or gpus * nodes % model:
        draft.say(PROBLEM, "the old command names no --global-batch-size: set GLOBAL_BATCH_SIZE")
        return
    ranks = gpus * nodes // model
    draft.set("GLOBAL_BATCH_SIZE", str(micro * ranks), Flag("--global-batch-size", (), 0))
    draft.say(CHANGED, f"GLOBAL_BATCH_SIZE={micro * ranks}: the old program's default, MICRO_BATCH_SIZE={micro} x"
              f" {ranks} data parallel ranks")  # fmt: skip


def _start(draft: Draft, hf_model_path: Path | None) -> None:
    """Where the run starts: from weights, or at random in the shape of HF_MODEL_PATH."""
    flags = draft.step.flags
    for flag, name in (("--data-path", "DATASET_PATH"), ("--save", "SAVE_CHECKPOINT_PATH")):
        if not draft.get(name) and flag not in flags and "--train-data-path" not in flags:
            draft.say(PROBLEM, f"the old command names no {flag}: set {name}")
    if draft.get("LOAD_CHECKPOINT_PATH"):
        draft.say(CHANGED, f"LOAD_CHECKPOINT_PATH={draft.get('LOAD_CHECKPOINT_PATH')}: the folder must hold config.json"
                  " and the tokenizer beside the weights, as step 2 writes it")  # fmt: skip
    elif not {"--load", "--pretrained-checkpoint"} & flags.keys():
        if hf_model_path:
            draft.settings["HF_MODEL_PATH"] = (str(hf_model_path), "--hf-model-path: random weights in this shape")
        else:
            draft.say(
                PROBLEM, "the old command loads nothing: set HF_MODEL_PATH for random weights, or LOAD_CHECKPOINT_PATH"
            )


def _finish_conversion(draft: Draft) -> None:
    """The direction of a conversion, and its format."""
    if "CONVERT_TYPE" not in draft.settings:
        draft.settings["CONVERT_TYPE"] = ("huggingface-to-megatron", "the direction without --convert-checkpoint-...")
        draft.say(CHANGED, "CKPT_FORMAT is the vendor's default here: torch_dist loads at any TP and PP, and the old"
                  " kit's torch format at its own only")  # fmt: skip


def refusal(draft: Draft) -> str | None:
    """Why step 3 would refuse the settings; None if it would not."""
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser, TrainSettings)
    values = {**draft.defaults, **{name: value for name, (value, _) in draft.settings.items()}}
    values["SAVE_CHECKPOINT_PATH"] = values.get("SAVE_CHECKPOINT_PATH") or "unset"
    if values["TRAIN_OR_CONVERT_CKPT"] == "train":
        values["DATASET_PATH"] = values["DATASET_PATH"] or "unset"
        values["EPOCHS"] = values["EPOCHS"] or ("" if values["TRAIN_ITERS"] else "3")
    flags = [
        f"--{name.lower().replace('_', '-')}={value}" for name, value in values.items() if value and name in FIELDS
    ]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            from_namespace(TrainSettings, parser.parse_args(flags))
    except KitError as error:
        return str(error)
    except SystemExit:
        return said.getvalue().strip().splitlines()[-1]
    return None
