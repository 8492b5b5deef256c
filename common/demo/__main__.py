"""`python -m common.demo`: `run` is the quickstart; `make` and `ask` are steps of it."""

import argparse
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import errors, log
from common.demo.answers import ANSWERS, ask, load_answers, read_prompts, save_answers
from common.demo.recipe import QuickstartSettings, own_kind, steps_of, work_dir
from common.demo.report import report, score
from common.demo.sample import write_sample
from common.demo.steps import Runner
from common.errors import KitError
from common.log import logger
from common.platforms import current
from common.settings import add_commands, from_namespace, option

PASS_PERCENT = 90


@dataclass(frozen=True)
class MakeSettings:
    """A tiny Qwen2.5 of random weights with its tokenizer, and sample data."""

    folder: str = option(help="where they are written")
    seed: int = option(1, "of weights and data")


@dataclass(frozen=True)
class AskSettings:
    """What two models say to the first rows of a file."""

    before: str = option(help="Hugging Face folder of the one model")
    after: str = option(help="Hugging Face folder of the other")
    input: str = option(help="rows of conversations, whose last answer is left to the models, or of text")
    folder: str = option(help=f"where {ANSWERS} is written")
    count: int = option(3, "rows")
    roles: str = option("system", "rows' instruction is the system's turn, or alpaca", ("system", "alpaca"))
    max_new_tokens: int = option(64, "longest answer")


def tell(line: str) -> None:
    """Prints `line` at once."""
    print(line, flush=True)


def run(settings: QuickstartSettings) -> None:
    """Takes all steps and reports; exits with 1 when too few of the sample's questions are answered."""
    began = time.monotonic()
    work = work_dir(settings)
    (work / "steps").mkdir(parents=True, exist_ok=True)
    runner = Runner(work, steps_of(settings, work, current().name), tell)
    if settings.input:
        kind = own_kind(settings)
        left_out = "pretraining" if kind == "finetune" else "fine-tuning"
        tell(f"INPUT holds {'conversations' if kind == 'finetune' else 'texts'}: {left_out} is left out.")
    runner.run()
    answers = load_answers(work / "answers" / ANSWERS)
    for line in report(runner, answers, ("before", "after") if settings.input else ("untrained", "trained")):
        tell(line)
    seconds = time.monotonic() - began
    tell(f"\nDone in {seconds // 60:.0f} min {seconds % 60:.0f} s.")
    if not settings.input:
        judge(score(answers, "before"), score(answers, "after"), len(answers))
        script = f"{current().name}/quickstart.sh"
        tell(f"With your own model and rows: WORK_DIR=work/own HF_MODEL_PATH=... INPUT=... bash {script} (see --help)")


def judge(before: int, after: int, count: int) -> None:
    """Tells the score; exits with 1 when it is under PASS_PERCENT."""
    tell(f"Score: {after} of {count} questions right, all of them absent from training; untrained: {before}.")
    if after * 100 < PASS_PERCENT * count:
        needed = -(-PASS_PERCENT * count // 100)
        tell(f"That is too few: {needed} were to be right. Something is broken here; the logs tell what was done.")
        sys.exit(1)


def make(settings: MakeSettings) -> None:
    """Writes the sample."""
    write_sample(Path(settings.folder), settings.seed)


def put_questions(settings: AskSettings) -> None:
    """Asks both models and writes their answers."""
    if settings.count < 1:
        raise KitError(f"COUNT={settings.count}: it must be at least 1")
    prompts = read_prompts(settings.input, settings.count, settings.roles)
    answers = ask(Path(settings.before), Path(settings.after), prompts, settings.max_new_tokens)
    save_answers(Path(settings.folder) / ANSWERS, answers)
    logger.info("%d questions answered by both models", len(answers))


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "run": (QuickstartSettings, run),
    "make": (MakeSettings, make),
    "ask": (AskSettings, put_questions),
}


def main() -> None:
    """Runs the command that the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m common.demo", description=(__doc__ or "").split("\n")[0])
    add_commands(parser, COMMANDS)
    arguments = parser.parse_args()
    log.setup()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a step is ended too
    settings_type, act = COMMANDS[arguments.command]
    act(from_namespace(settings_type, arguments))


if __name__ == "__main__":
    errors.run(main)
