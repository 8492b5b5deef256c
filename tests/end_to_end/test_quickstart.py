"""`cpu/quickstart.sh` as a new user runs it: interrupted, resumed, run once more; then with the user's own rows.

Settings come from the environment, and the models' answers are checked here from their own file.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.demo.corpus import NUM_QUESTIONS, QUESTIONS
from tests.tiny import tiny_qwen

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 1200  # a busy machine's
STEPS = 9


def listen_to_ctrl_c() -> None:
    """Undoes what a shell does to a test run in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Quickstart:
    """A running quickstart with its output so far."""

    def __init__(self, **settings: object) -> None:
        given = {name: str(value) for name, value in settings.items()}
        self.process = subprocess.Popen(
            ["bash", "cpu/quickstart.sh"], cwd=ROOT, env={**os.environ, "PYTHON": sys.executable, **given},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            preexec_fn=listen_to_ctrl_c,
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, seen: Callable[[str], bool]) -> None:
        """Returns when `seen` accepts the output; fails when the run ends before."""
        began = time.monotonic()
        while not seen(self.text):
            assert self.process.poll() is None and time.monotonic() - began < LIMIT_SECONDS, self.text
            time.sleep(0.1)

    def interrupt(self) -> int:
        """Ctrl-C, which reaches every process of the terminal; the exit status."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.end()

    def finished(self) -> str:
        """The output of a run that must succeed."""
        assert self.end() == 0, self.text
        return self.text

    def end(self) -> int:
        """The exit status of the run."""
        status = self.process.wait(timeout=LIMIT_SECONDS)
        self._reader.join()
        return status


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quick start") / "work"


def test_an_interrupted_run_resumes_and_the_model_learns(work: Path) -> None:
    first = Quickstart(WORK_DIR=work, LOAD_CHECKPOINT_PATH="/not/for/the/steps", TRAIN_ITERS=3)
    first.wait_for(lambda text: f"saved {work}/pretrain/iter_" in text)
    assert first.interrupt() == 130, first.text
    assert "interrupted" in first.text and "Traceback" not in first.text

    second = Quickstart(WORK_DIR=work)
    assert second.end() == 0, second.text
    assert second.text.count("    done already") == 4
    assert f"start: resume from {work}/pretrain/iter_" in second.text
    assert second.text.count("    done in ") == STEPS - 4
    assert all(f"[{number}/{STEPS}] " in second.text for number in range(1, STEPS + 1))
    assert "UserWarning" not in second.text


def test_the_exported_model_answers_what_no_row_holds(work: Path) -> None:
    rows = [json.loads(line) for line in (work / "sample" / QUESTIONS).read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(work / "huggingface")
    model = AutoModelForCausalLM.from_pretrained(work / "huggingface")
    right = 0
    for row in rows:
        chat = [{"role": "system", "content": row["instruction"]}, {"role": "user", "content": row["input"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = model.generate(**prompt, max_new_tokens=20)[0, prompt["input_ids"].shape[1] :]
        right += tokenizer.decode(ids, skip_special_tokens=True) == row["output"]
    assert len(rows) == NUM_QUESTIONS and right >= 0.9 * NUM_QUESTIONS


def test_another_run_repeats_nothing_and_prints_the_same(work: Path) -> None:
    began = time.time()
    third = Quickstart(WORK_DIR=work)
    assert third.end() == 0, third.text
    assert third.text.count("    done already") == STEPS and "    done in" not in third.text
    assert "of 50 questions right" in third.text and "untrained: 0." in third.text
    made = [path for path in work.rglob("*") if path.is_file() and path.stat().st_mtime > began]
    assert not made, made


def test_it_ends_with_the_line_that_talks_to_the_model(work: Path) -> None:
    text = Quickstart(WORK_DIR=work).finished()
    *_, title, line, ask = text.splitlines()
    question = ask.removeprefix("    and ask: ")
    assert title.startswith("Talk to the model") and "bash cpu/4_chat.sh" in line and question != ask
    done = subprocess.run(
        line, shell=True, cwd=ROOT, input=f"{question}\n", capture_output=True, text=True, timeout=LIMIT_SECONDS,
        env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    answers = json.loads((work / "answers" / "answers.json").read_text(encoding="utf-8"))["answers"]
    (expected,) = {answer["after"] for answer in answers if answer["question"] == question}
    assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr


def test_another_seed_needs_another_folder(work: Path) -> None:
    other = Quickstart(WORK_DIR=work, SEED=2)
    assert other.end() == 2
    assert f"error: WORK_DIR={work} holds a quickstart with other settings or data" in other.text


def conversation(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


FOX = "Row {}: the quick brown fox jumps over the lazy dog. 今天天气很好。"
OWN = {
    "conversations": ([conversation(f"{i}+1?", f"{i + 1}") for i in range(40)], "1"),
    "texts": ([{"text": FOX.format(i)} for i in range(40)], FOX.format(0)[len(FOX.format(0)) // 2 :]),
}


@pytest.mark.parametrize("kind", OWN)
def test_the_users_rows_train_the_users_model_in_their_stage(tmp_path: Path, kind: str) -> None:
    model, rows = tiny_qwen(tmp_path / "model", std=0.02, spread=0.0), tmp_path / "my rows.jsonl"
    given, expected = OWN[kind]
    rows.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given), encoding="utf-8")
    settings = {"HF_MODEL_PATH": model, "INPUT": rows, "WORK_DIR": tmp_path / "work", "SEQ_LENGTH": 128, "LR": 2e-2}
    run = Quickstart(**settings, EPOCHS=4, GLOBAL_BATCH_SIZE=8, MICRO_BATCH_SIZE=8)
    assert run.end() == 0, run.text
    left_out = "pretraining" if kind == "conversations" else "fine-tuning"
    assert f"INPUT holds {kind}: {left_out} is skipped." in run.text and "Score" not in run.text
    content = json.loads((tmp_path / "work" / "answers" / "answers.json").read_text(encoding="utf-8"))
    answers = content["answers"]
    assert len(answers) == 3 and answers[0]["before"] != answers[0]["after"]
    assert answers[0]["expected"] == expected
