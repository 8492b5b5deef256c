"""The quickstart's final report: losses, answers, the score, and the paths of the files."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.demo.answers import Answer
from common.demo.corpus import SYSTEM
from common.demo.steps import TRAINING_LINE, Runner, shown

SHOWN_ANSWERS = 6
SHOWN_CHARACTERS = 70
SAMPLE_ANSWER_TOKENS = 64  # the sample's model has few positions
FILES = {
    "sample": "the tiny random model, and the sample data",
    "tokens_pretrain": "the texts as Megatron's .bin and .idx",
    "tokens_finetune": "the conversations as .bin and .idx, with what is learned of them",
    "megatron": "the model as a Megatron checkpoint, before training",
    "pretrain": "checkpoints of pretraining (distributed format)",
    "finetune": "checkpoints of fine-tuning (distributed format)",
    "torch": "the trained weights in torch format",
    "huggingface": "the trained model, for transformers, vLLM and others",
    "answers": "all questions and answers",
}


def losses(log: Path) -> tuple[float, float] | None:
    """The first and the last training loss in `log`; None if it has none."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    found = [float(match["loss"]) for line in lines if (match := TRAINING_LINE.search(line))]
    return (found[0], found[-1]) if found else None


def score(answers: Sequence[Answer], which: str) -> int:
    """The number of answers, those "before" or "after" training, that equal the expected ones."""
    return sum(getattr(answer, which) == answer.expected for answer in answers)


def one_line(text: str) -> str:
    """`text` for a line of the report: newlines shown as ⏎, truncated to SHOWN_CHARACTERS."""
    line = " ⏎ ".join(text.split("\n"))
    return line if len(line) <= SHOWN_CHARACTERS else line[:SHOWN_CHARACTERS] + " …"


def report(runner: Runner, answers: Sequence[Answer], models: tuple[str, str]) -> Iterator[str]:
    """The lines of the report without the score; `models` are the names of the model before and after training."""
    yield "\nLoss, at the start and at the end"
    for step in runner.steps:
        if pair := losses(runner.log(step)):
            yield f"    {step.name:<10} {pair[0]:7.3f}  ->  {pair[1]:7.3f}"
    yield from _answers(answers, models)
    yield "\nFiles"
    for step in runner.steps:
        yield f"    {shown(step.output):<28} {FILES[step.output.name]}"
    yield f"    {shown(runner.work_dir / 'logs'):<28} the output of all steps"


def _answers(answers: Sequence[Answer], models: tuple[str, str]) -> Iterator[str]:
    yield "\nQuestions"
    for answer in answers[:SHOWN_ANSWERS]:
        yield f"    {one_line(answer.question)}"
        texts = (answer.expected, answer.before, answer.after)
        for name, text in zip(("expected", *models), texts, strict=True):
            yield f"        {name:<10} {one_line(text)}"


def invitation(model: Path, platform: str, sample: Sequence[Answer] | None) -> Iterator[str]:
    """The line that talks to `model`; for the sample's, in the way it was trained, and with one of its questions."""
    settings = [f"HF_MODEL_PATH={shlex.quote(shown(model))}"]
    yield "\nTalk to the model / 与模型对话"
    if sample is not None:
        settings += [f"SYSTEM={shlex.quote(SYSTEM['en'])}", f"MAX_NEW_TOKENS={SAMPLE_ANSWER_TOKENS}"]
    yield f"    {' '.join(settings)} bash {platform}/4_chat.sh"
    for answer in sample or ():
        if answer.question.isascii() and "\n" not in answer.question:
            yield f"    and ask: {answer.question}"
            return
