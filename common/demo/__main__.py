"""`python -m common.demo`: `run` is the quickstart; `make` and `ask` are two of its steps."""

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
from common.demo.report import invitation, report, score
from common.demo.sample import write_sample
from common.demo.steps import Runner
from common.errors import KitError
from common.log import logger
from common.platforms import current
from common.settings import add_commands, from_namespace, option

PASS_PERCENT = 90


@dataclass(frozen=True)
class MakeSettings:
    """A tiny Qwen2.5 with random weights, its tokenizer, and sample data."""

    folder: str = option(help="output folder")
    seed: int = option(1, "seed of weights and data")


@dataclass(frozen=True)
class AskSettings:
    """The answers of two models to the first rows of a file."""

    before: str = option(help="Hugging Face folder of the model before training")
    after: str = option(help="Hugging Face folder of the model after training")
    input: str = option(help="rows of conversations, whose last answer the models generate, or of text")
    folder: str = option(help=f"output folder of {ANSWERS}")
    count: int = option(3, "number of rows")
    roles: str = option("system", "instruction is the system turn; or alpaca", ("system", "alpaca"))
    max_new_tokens: int = option(64, "maximum length of an answer in tokens")


def print_line(line: str) -> None:
    """Prints `line`, unbuffered."""
    print(line, flush=True)


def run(settings: QuickstartSettings) -> None:
    """Runs all steps and prints the report; exits 1 if too few of the sample's questions are answered correctly."""
    began = time.monotonic()
    work = work_dir(settings)
    (work / "steps").mkdir(parents=True, exist_ok=True)
    runner = Runner(work, steps_of(settings, work, current().name), print_line)
    if settings.input:
        kind = own_kind(settings)
        skipped = "pretraining" if kind == "finetune" else "fine-tuning"
        print_line(f"INPUT holds {'conversations' if kind == 'finetune' else 'texts'}: {skipped} is skipped.")
    runner.run()
    answers = load_answers(work / "answers" / ANSWERS)
    for line in report(runner, answers, ("before", "after") if settings.input else ("untrained", "trained")):
        print_line(line)
    seconds = time.monotonic() - began
    print_line(f"\nDone in {seconds // 60:.0f} min {seconds % 60:.0f} s.")
    if not settings.input:
        judge(score(answers, "before"), score(answers, "after"), len(answers))
        script = f"{current().name}/quickstart.sh"
        print_line(
            f"With your own model and rows: WORK_DIR=work/own HF_MODEL_PATH=... INPUT=... bash {script} (--help)"
        )
    for line in invitation(work / "huggingface", current().name, None if settings.input else answers):
        print_line(line)


def judge(before: int, after: int, count: int) -> None:
    """Prints the score; exits 1 if it is below PASS_PERCENT."""
    print_line(f"Score: {after} of {count} questions right, all held out from training; untrained: {before}.")
    if after * 100 < PASS_PERCENT * count:
        needed = -(-PASS_PERCENT * count // 100)
        print_line(f"That is too few: at least {needed} are expected. Something is broken here; see the logs.")
        sys.exit(1)


def make(settings: MakeSettings) -> None:
    """Writes the sample model and data."""
    write_sample(Path(settings.folder), settings.seed)


def put_questions(settings: AskSettings) -> None:
    """Generates the answers of both models and writes them."""
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
    """Runs the command on the command line."""
    parser = argparse.ArgumentParser(prog="python -m common.demo", description=(__doc__ or "").split("\n")[0])
    add_commands(parser, COMMANDS)
    arguments = parser.parse_args()
    log.setup()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # terminates the running step too
    settings_type, act = COMMANDS[arguments.command]
    act(from_namespace(settings_type, arguments))


if __name__ == "__main__":
    errors.run(main)
