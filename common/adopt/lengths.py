"""The rules of flags.txt for the length of a run and its learning rates: all in steps here."""

import math
import re

from common.adopt.command_line import Flag
from common.adopt.draft import CHANGED, HERE, PROBLEM, Draft
from common.adopt.table import Row

OTHER_ENDS = ("constant", "inverse-square-root")  # styles that do not end at MIN_LR


def as_number(text: str) -> float | None:
    """The number that `text` is; None if it is none."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def copy_int(draft: Draft, row: Row, flag: Flag) -> None:
    """Sets the setting to an integer; the arithmetic that the script made it by is a remark."""
    if not re.fullmatch(r"[0-9]+", flag.value):
        draft.note(PROBLEM, flag, f"it is no whole number: set {row.setting} yourself")
        return
    draft.set(row.setting, flag.value, flag)
    names = draft.variables.origins(draft.step.command.read) & draft.variables.arithmetic.keys()
    equal = sorted(name for name in names if draft.variables.values[name] == [flag.value])
    named = [name for name in equal if f"--{name.lower().replace('_', '-')}" == flag.name]
    if len(named or equal) == 1:
        zero = "; the script rounds it down to 0" if flag.value == "0" else ""
        draft.note(CHANGED, flag, f"the script's arithmetic: {draft.variables.arithmetic[(named or equal)[0]]}{zero}")


def iters(draft: Draft, row: Row, flag: Flag) -> None:
    """TRAIN_ITERS; a number of epochs in the script is pointed out."""
    copy_int(draft, row, flag)
    names = draft.variables.origins(draft.step.command.read)
    epochs = next((name for name in sorted(names) if re.search(r"epoch", name, re.I)), None)
    if epochs and flag.value.isdecimal():
        count = draft.variables.shown(draft.variables.values[epochs][0])
        draft.note(
            CHANGED, flag,
            f"it came from a number of samples typed by hand, which no file confirms: EPOCHS={count} instead of"
            " TRAIN_ITERS counts the samples of the data, without those of validation",
        )  # fmt: skip


def per_batch(draft: Draft, row: Row, flag: Flag) -> None:
    """Steps from a number of samples."""
    _steps(draft, row, flag, ("GLOBAL_BATCH_SIZE",))


def per_token(draft: Draft, row: Row, flag: Flag) -> None:
    """Steps from a number of tokens."""
    _steps(draft, row, flag, ("GLOBAL_BATCH_SIZE", "SEQ_LENGTH"))


def _steps(draft: Draft, row: Row, flag: Flag, units: tuple[str, ...]) -> None:
    sizes = [draft.number(name) for name in units]
    total = as_number(flag.value)
    if total is None or not all(sizes):
        draft.note(PROBLEM, flag, f"{row.setting} counts steps, and {' x '.join(units)} is not known: set it yourself")
        return
    steps = int(total) // math.prod(size or 1 for size in sizes)
    shown = " / ".join(f"{name}={size}" for name, size in zip(units, sizes, strict=True))
    draft.set(row.setting, str(steps), flag)
    draft.note(CHANGED, flag, f"{row.setting} counts steps: {int(total)} / {shown} = {steps}")


def decay_style(draft: Draft, row: Row, flag: Flag) -> None:
    """LR_DECAY_STYLE, whose names are Megatron's."""
    draft.set(row.setting, flag.value, flag)
    if flag.value not in OTHER_ENDS:
        draft.note(CHANGED, flag, "the last step has MIN_LR; the old program would reach it one step later")


def wsd_iters(draft: Draft, row: Row, flag: Flag) -> None:
    """LR_WSD_DECAY_ITERS, which only WSD has."""
    if _has_wsd(draft, flag):
        copy_int(draft, row, flag)


def wsd_samples(draft: Draft, row: Row, flag: Flag) -> None:
    """LR_WSD_DECAY_ITERS from a number of samples."""
    if _has_wsd(draft, flag):
        per_batch(draft, row, flag)


def _has_wsd(draft: Draft, flag: Flag) -> bool:
    if draft.get("LR_DECAY_STYLE") == "WSD":
        return True
    draft.note(HERE, flag, "it had no effect without --lr-decay-style WSD")
    return False


def decay_iters(draft: Draft, row: Row, flag: Flag) -> None:
    """The decay takes the whole run here."""
    _decay(draft, flag, flag.value)


def decay_samples(draft: Draft, row: Row, flag: Flag) -> None:
    """The decay takes the whole run here."""
    batch, samples = draft.number("GLOBAL_BATCH_SIZE"), as_number(flag.value)
    _decay(draft, flag, str(int(samples) // batch) if samples is not None and batch else "?")


def _decay(draft: Draft, flag: Flag, steps: str) -> None:
    total = draft.get("TRAIN_ITERS")
    if steps == total:
        draft.note(HERE, flag, "the learning rate always decays over the whole run")
    else:
        draft.note(
            PROBLEM, flag,
            f"the learning rate decays over all TRAIN_ITERS={total or '?'} steps here, not over {steps}: set"
            " TRAIN_ITERS, or accept the other curve",
        )  # fmt: skip


def warmup_fraction(draft: Draft, row: Row, flag: Flag) -> None:
    """LR_WARMUP_FRACTION of the run; of Megatron's decay, if that is another length, as steps."""
    fraction, decay = as_number(flag.value), draft.step.flags.get("--lr-decay-iters")
    if fraction is None:
        draft.note(PROBLEM, flag, f"it is no number: set {row.setting} yourself")
    elif decay and decay.value.isdecimal() and decay.value != draft.get("TRAIN_ITERS"):
        steps = int(fraction * int(decay.value))
        draft.set("LR_WARMUP_ITERS", str(steps), flag)
        draft.note(CHANGED, flag, f"it was a fraction of the decay, here it is one of the run: {flag.value} x"
                   f" {decay.value} = {steps} steps")  # fmt: skip
    else:
        draft.set(row.setting, str(fraction), flag)
        draft.settings.pop("LR_WARMUP_ITERS", None)
