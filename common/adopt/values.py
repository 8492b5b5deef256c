"""The rules of flags.txt: each converts one flag into settings or remarks of a draft."""

import re
import shlex
from collections.abc import Callable

from common.adopt import lengths
from common.adopt.command_line import Flag
from common.adopt.draft import CHANGED, HERE, PROBLEM, Draft
from common.adopt.lengths import as_number, copy_int
from common.adopt.table import Row

Rule = Callable[[Draft, Row, Flag], None]
DOCUMENT = "_text_document"
PROFILE_STEPS = {"--profile-step-start": "10", "--profile-step-end": "12"}  # and Megatron's defaults


def copy_number(draft: Draft, row: Row, flag: Flag) -> None:
    """Sets the setting to a number, as it is written."""
    if as_number(flag.value) is not None:
        draft.set(row.setting, flag.value, flag)
    else:
        draft.note(PROBLEM, flag, f"it is no number: set {row.setting} yourself")


def copy_text(draft: Draft, row: Row, flag: Flag) -> None:
    """Sets the setting to the text."""
    if flag.value:
        draft.set(row.setting, flag.value, flag)
    else:
        draft.note(PROBLEM, flag, f"it has no value: set {row.setting} yourself")


def switch_on(draft: Draft, row: Row, flag: Flag) -> None:
    """Sets the setting to the rule's word."""
    draft.set(row.setting, row.argument, flag)
    if flag.words and not row.note:
        draft.note(PROBLEM, flag, "the flag has no value: what is this word?")


def equal(draft: Draft, row: Row, flag: Flag) -> None:
    """Nothing to set if the value is the rule's; else a problem."""
    wanted, given = as_number(row.argument), as_number(flag.value)
    same = wanted == given if wanted is not None and given is not None else flag.value == row.argument
    draft.note(HERE if same else PROBLEM, flag, "always so here" if same else row.text(flag.value))


def refuse(draft: Draft, row: Row, flag: Flag) -> None:
    """A problem."""
    draft.note(PROBLEM, flag, row.text(flag.value))


def nothing(draft: Draft, row: Row, flag: Flag) -> None:
    """Nothing to set; the note says why."""
    if not row.is_changed:
        draft.note(HERE, flag, row.text(flag.value))


def port(draft: Draft, row: Row, flag: Flag) -> None:
    """MASTER_PORT; a port that the script draws needs no setting."""
    if re.fullmatch(r"[0-9]+", flag.value):
        draft.set(row.setting, flag.value, flag)
    else:
        draft.note(HERE, flag, "one node takes any free port, several take 29500 of node 0 unless MASTER_PORT is set")


def split(draft: Draft, row: Row, flag: Flag) -> None:
    """SPLIT, three shares, of which the third is of no use here."""
    shares = flag.value.replace(" ", "").split(",")
    draft.set(row.setting, ",".join(shares), flag)
    if len(shares) > 2 and as_number(shares[2]):
        draft.note(CHANGED, flag, "the third share is not used here; the old program made a test set of it")


def blend(draft: Draft, row: Row, flag: Flag) -> None:
    """DATASET_PATH: one prefix, or weights and prefixes; without the `_text_document` that the setting adds."""
    words = [word.removesuffix(DOCUMENT) for word in flag.words]
    if len(words) > 1 and all(as_number(word) is None for word in words):
        draft.note(CHANGED, flag, "paths without weights were blended by their sizes; here each needs its weight")
        draft.note(PROBLEM, flag, f"write {row.setting} with weights, as 0.7 a 0.3 b")
    elif not words:
        draft.note(PROBLEM, flag, f"it has no value: set {row.setting} yourself")
    else:
        draft.set(row.setting, " ".join(words), flag)


def dataset(draft: Draft, row: Row, flag: Flag) -> None:
    """The kind of data of Pai-Megatron-Patch: index files, or JSON that step 1 must read first."""
    if not flag.value.startswith("JSON"):
        known = "MMAP" in flag.value or "Idxmap" in flag.value
        draft.note(HERE if known else PROBLEM, flag, "DATASET_PATH is always .bin and .idx")
        return
    path = draft.get("DATASET_PATH") or "ROWS.json"
    prefix = re.sub(r"\.jsonl?$", "", path)
    draft.note(
        PROBLEM, flag,
        f"rows are not read in training: INPUT={shlex.quote(path)} OUTPUT_PREFIX={shlex.quote(prefix)}"
        f" TOKENIZER_PATH=MODEL bash {draft.vendor}/1_preprocess_sft.sh, then DATASET_PATH={shlex.quote(prefix)}"
        " (and VALID_DATASET_PATH alike)",
    )  # fmt: skip


def reset(draft: Draft, row: Row, flag: Flag) -> None:
    """Attention within documents (pretraining), or packed samples (fine-tuning)."""
    if draft.get("TRAIN_MODE") == "finetune":
        draft.set("PACKING", "true", flag)
        draft.note(
            CHANGED, flag, "samples are packed as they are read, each attends to itself only; step 1 does not pack"
        )
    else:
        draft.set("RESET_ATTENTION", "true", flag)
        if flag.name == "--reset-position-ids" and "--reset-attention-mask" not in draft.step.flags:
            draft.note(CHANGED, flag, "RESET_ATTENTION also keeps the documents of a sample apart in attention")


def eod_mask(draft: Draft, row: Row, flag: Flag) -> None:
    """The end of a document is learned here."""
    if draft.get("TRAIN_MODE") == "finetune":
        draft.note(HERE, flag, "step 1 has marked the tokens that are learned")
    else:
        draft.note(CHANGED, flag, "the end of a document is learned here: step 1 with APPEND_EOD=false writes none")


def vpp_layers(draft: Draft, row: Row, flag: Flag) -> None:
    """VPP: layers of a stage by layers of a chunk."""
    layers = draft.step.flags.get("--num-layers")
    total = layers.value if layers else str(draft.qwen.num_hidden_layers) if draft.qwen else ""
    stages, chunk = draft.number("PP"), flag.value
    if not (
        total.isdecimal() and chunk.isdecimal() and stages and int(chunk) and int(total) % (stages * int(chunk)) == 0
    ):
        draft.note(PROBLEM, flag, f"{total or 'how many'} layers / PP={stages} / {chunk} is no whole number: set VPP")
        return
    count = int(total) // stages // int(chunk)
    draft.set("VPP", str(count), flag)
    draft.note(CHANGED, flag, f"VPP counts chunks of a stage: {total} layers / PP={stages} / {chunk} = {count}")


def optimizer(draft: Draft, row: Row, flag: Flag) -> None:
    """Adam, or Adam with its state in host memory."""
    if flag.value == "hybridadam":
        offload(draft, row, flag)
    else:
        draft.note(HERE if flag.value == "adam" else PROBLEM, flag, row.text(flag.value))


def offload(draft: Draft, row: Row, flag: Flag) -> None:
    """Adam's state in host memory."""
    _add_optimizer_state(draft, flag, "cpu")


def _add_optimizer_state(draft: Draft, flag: Flag, value: str) -> None:
    """Sets OPTIMIZER_STATE to what `value` is with the flags before it: bf16 moments in host memory are cpu_bf16."""
    before = draft.settings["OPTIMIZER_STATE"][0] if "OPTIMIZER_STATE" in draft.settings else "fp32"
    kinds = {*before.split("_"), value} - {"fp32"}
    draft.set("OPTIMIZER_STATE", "_".join(sorted(kinds, reverse=True)) or "fp32", flag)


def moments(draft: Draft, row: Row, flag: Flag) -> None:
    """The precision of Adam's moments."""
    if flag.value in ("fp32", "bf16"):
        _add_optimizer_state(draft, flag, flag.value)
    else:
        draft.note(PROBLEM, flag, "Adam's moments are fp32 or bf16 here (OPTIMIZER_STATE)")


def fp16(draft: Draft, row: Row, flag: Flag) -> None:
    """There is no fp16 here."""
    draft.set(row.setting, "bf16", flag)
    draft.note(PROBLEM, flag, "fp16 is not trained here: PRECISION=bf16, which needs no loss scale, or fp32")


def fp8_format(draft: Draft, row: Row, flag: Flag) -> None:
    """FP8_FORMAT, with the old program's recipe."""
    draft.set(row.setting, flag.value or "hybrid", flag)
    if "--fp8-recipe" not in draft.step.flags:
        draft.note(CHANGED, flag, "the old program's recipe was delayed; FP8_RECIPE=tensorwise here needs no history")


def transformer_impl(draft: Draft, row: Row, flag: Flag) -> None:
    """TRANSFORMER_IMPL; the vendor's where it has no Transformer Engine."""
    own = draft.defaults.get("TRANSFORMER_IMPL")
    if flag.value == "transformer_engine" and own == "local":
        if flag.line:
            draft.note(CHANGED, flag, f"there is no Transformer Engine in {draft.vendor}/: TRANSFORMER_IMPL={own}")
    else:
        draft.set(row.setting, flag.value, flag)


def recompute_method(draft: Draft, row: Row, flag: Flag) -> None:
    """With `block` the first layers are recomputed, with `uniform` all of them."""
    draft.note(
        HERE, flag, "RECOMPUTE_NUM_LAYERS means block, and without it all layers are recomputed, which is uniform"
    )


def recompute_layers(draft: Draft, row: Row, flag: Flag) -> None:
    """RECOMPUTE_NUM_LAYERS, which is Megatron's only with the method `block`."""
    method = draft.step.flags.get("--recompute-method")
    if method and method.value == "uniform":
        draft.note(
            CHANGED, flag, "with uniform it was the layers of a group, and all are recomputed: RECOMPUTE=full alone"
        )
    elif draft.get("RECOMPUTE") == "full":
        copy_int(draft, row, flag)
    else:
        draft.note(PROBLEM, flag, "it needs --recompute-granularity full: RECOMPUTE=full")


def save(draft: Draft, row: Row, flag: Flag) -> None:
    """SAVE_CHECKPOINT_PATH; a conversion writes elsewhere."""
    if "--ckpt-convert-save" in draft.step.flags:
        draft.note(HERE, flag, "a conversion writes to SAVE_CHECKPOINT_PATH alone (--ckpt-convert-save)")
        return
    draft.set(row.setting, flag.value, flag)
    load = draft.step.flags.get("--load")
    if load and load.value == flag.value:
        draft.note(CHANGED, flag, "the run resumes from this folder by itself; LOAD_CHECKPOINT_PATH is read only if it"
                   " holds no iteration")  # fmt: skip


def no_save_optim(draft: Draft, row: Row, flag: Flag) -> None:
    """SAVE_OPTIMIZER=false, which cannot be resumed."""
    draft.set(row.setting, "false", flag)
    draft.note(PROBLEM, flag, "such a run can never be resumed: SAVE_OPTIMIZER=true unless the space is needed")


def weights_only(draft: Draft, row: Row, flag: Flag) -> None:
    """IS_INITIAL_RUN=auto: weights only at the first start, everything afterwards."""
    noted = row.setting in draft.settings
    draft.set(row.setting, "auto", flag)
    text = (
        "IS_INITIAL_RUN=auto takes weights only at the first start, and resumes with optimizer and random state"
        " afterwards; left on, the old flag lost them at each start"
    )
    draft.note(HERE if noted else CHANGED, flag, "IS_INITIAL_RUN=auto says so already" if noted else text)


def convert_format(draft: Draft, row: Row, flag: Flag) -> None:
    """TRAIN_OR_CONVERT_CKPT=convert, to torch format."""
    if flag.value == "torch":
        draft.set(row.setting, "convert", flag)
    else:
        draft.note(PROBLEM, flag, "a conversion writes torch format; torch_dist is what training writes (CKPT_FORMAT)")


def convert_save(draft: Draft, row: Row, flag: Flag) -> None:
    """SAVE_CHECKPOINT_PATH of a conversion."""
    draft.set("SAVE_CHECKPOINT_PATH", flag.value, flag)
    draft.note(CHANGED, flag, f"the checkpoint is in {flag.value} itself; Megatron-LM added a folder torch/ to it")
    draft.note(
        CHANGED,
        flag,
        "step 2 exports torch_dist to Hugging Face too, so this conversion is needed for other tools only",
    )


def tensorboard(draft: Draft, row: Row, flag: Flag) -> None:
    """TENSORBOARD=true; the folder is the run's."""
    draft.set(row.setting, "true", flag)
    draft.note(CHANGED, flag, "event files are in SAVE_CHECKPOINT_PATH/tensorboard")


def profile(draft: Draft, row: Row, flag: Flag) -> None:
    """PROFILE: Megatron's first step is the one after --profile-step-start."""
    flags = draft.step.flags
    first, last = (flags[name].value if name in flags else usual for name, usual in PROFILE_STEPS.items())
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        draft.note(PROBLEM, flag, f"its steps are {first} to {last}: set PROFILE yourself, as 10-12")
        return
    draft.set(row.setting, f"{int(first) + 1}-{last}", flag)
    draft.note(CHANGED, flag, "a trace of torch.profiler in SAVE_CHECKPOINT_PATH/profile; nsys is not started")


def profile_ranks(draft: Draft, row: Row, flag: Flag) -> None:
    """PROFILE_RANKS."""
    draft.set(row.setting, ",".join(flag.words), flag)


def one_key(draft: Draft, row: Row, flag: Flag) -> None:
    """JSON_KEY, one for each run of step 1."""
    if draft.step.kind == "preprocess_sft":
        draft.note(HERE, flag, "FORMAT says what a fine-tuning row looks like")
    elif len(flag.words) == 1:
        draft.set(row.setting, flag.value, flag)
    else:
        draft.note(PROBLEM, flag, "one key in each run of step 1: run it again with the others as JSON_KEY")


def append_eod(draft: Draft, row: Row, flag: Flag) -> None:
    """APPEND_EOD; the end of a document is <|endoftext|> here."""
    if draft.step.kind == "preprocess_sft":
        draft.note(HERE, flag, "the old program ignored it for fine-tuning; a conversation ends with <|im_end|>")
        return
    draft.set(row.setting, "true", flag)
    draft.note(
        CHANGED, flag, "the end is <|endoftext|> for every model; an Instruct tokenizer's was <|im_end|> (EOD_TOKEN)"
    )


def partitions(draft: Draft, row: Row, flag: Flag) -> None:
    """The input is divided by itself."""
    if flag.line:
        draft.note(CHANGED, flag, "every input is divided over WORKERS by itself; PARTITIONS here shares it between"
                   " nodes, and INPUT is files, folders or globs")  # fmt: skip


def sample_length(draft: Draft, row: Row, flag: Flag) -> None:
    """SEQ_LENGTH of fine-tuning rows, which counts what is too long and changes no row."""
    if draft.step.kind == "preprocess_sft":
        draft.set(row.setting, flag.value, flag)
        draft.note(
            CHANGED,
            flag,
            "rows are neither padded nor cut in step 1; step 3 needs SEQ_LENGTH, and TRUNCATE for longer rows",
        )
    else:
        draft.note(HERE, flag, "documents are written whole; it had no effect in the old program either")


RULES: dict[str, Rule] = {
    "text": copy_text, "int": copy_int, "number": copy_number, "on": switch_on, "here": nothing, "keep": nothing,
    "equal": equal, "refuse": refuse,
    **{rule.__name__: rule for rule in (
        port, split, blend, dataset, reset, eod_mask, vpp_layers, lengths.iters, lengths.per_batch, lengths.per_token,
        lengths.decay_style, lengths.wsd_iters, lengths.wsd_samples, lengths.decay_iters, lengths.decay_samples,
        lengths.warmup_fraction, optimizer, offload, moments, fp16, fp8_format, transformer_impl, recompute_method,
        recompute_layers, save, no_save_optim, weights_only, convert_format, convert_save, tensorboard, profile,
        profile_ranks, one_key, append_eod, partitions, sample_length,
    )},
}  # fmt: skip
