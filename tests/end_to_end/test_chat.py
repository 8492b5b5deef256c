"""Step 4 as users run it: in a terminal, from a pipe, and with a file of prompts."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.steps import ROOT, write_rows
from tests.tiny import tiny_qwen

SCRIPT = ROOT / "cpu" / "4_chat.sh"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends an answer by itself."""
    return tiny_qwen(tmp_path_factory.mktemp("my model") / "qwen", max_position_embeddings=1 << 20)


def environment(**settings: object) -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable, **{name: str(value) for name, value in settings.items()}}


def chat(expect: int = 0, typed: str = "", **settings: object) -> tuple[str, str]:
    """(stdout, stderr) of the script with `typed` on stdin."""
    done = subprocess.run(
        ["bash", SCRIPT], input=typed, env=environment(**settings), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == expect and "Traceback" not in done.stderr, done.stderr
    return done.stdout, done.stderr


class Terminal:
    """The script in a terminal of its own, with what it shows."""

    def __init__(self, **settings: object) -> None:
        self.pid, self._handle = pty.fork()
        if not self.pid:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it, and so would the script
            os.execvpe("bash", ["bash", str(SCRIPT)], environment(TERM="dumb", **settings))
        self.shown = ""

    def type(self, text: str) -> int:
        """Types `text`; the length of what was shown before."""
        before = len(self.shown)
        os.write(self._handle, text.encode())
        return before

    def wait_for(self, pattern: str, since: int = 0, seconds: float = 120) -> str:
        """Returns what was shown `since`, once it holds `pattern`; raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.shown[since:]):
            if time.monotonic() > deadline:
                raise TimeoutError(self.shown)
            if select.select([self._handle], [], [], 1)[0]:
                try:
                    self.shown += os.read(self._handle, 65536).decode(errors="replace")
                except OSError:  # the script has ended
                    assert re.search(pattern, self.shown[since:]), self.shown
        return self.shown[since:]

    def end(self) -> int:
        """The exit status of the script."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self._handle)
        return os.waitstatus_to_exitcode(status)


@contextmanager
def terminal(**settings: object) -> Iterator[Terminal]:
    shown = Terminal(**settings)
    try:
        yield shown
    finally:
        with suppress(ProcessLookupError):
            os.kill(shown.pid, signal.SIGKILL)


def turns(*texts: str) -> dict[str, Any]:
    """A conversation whose turns are the user's and the assistant's, one after another."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def test_ctrl_c_stops_the_answer_and_not_the_program_and_ctrl_d_ends(qwen: Path) -> None:
    with terminal(HF_MODEL_PATH=qwen, MAX_NEW_TOKENS=100_000, TEMPERATURE=0) as user:
        user.wait_for(r"a conversation; Ctrl-C stops an answer[\s\S]*> ")
        for line in ("hello\n", "The quick brown fox\n"):
            before = user.type(line)
            assert len(user.wait_for(r"\n[\s\S]{40}", before)) > 40  # it streams: the end would take minutes
            user.type("\x03")
            user.wait_for(r"\(stopped\)[\s\S]*> ", before)
        before = user.type("\x03")
        while "/exit or Ctrl-D ends" not in user.shown[before:]:
            # Python's readline forgets a signal between the prompt and its select(): a user presses again.
            with suppress(TimeoutError):
                user.wait_for(r"/exit or Ctrl-D ends[\s\S]*> ", before, seconds=5)
                break
            user.type("\x03")
        before = user.type("/system Be brief.\n")
        user.wait_for(r"a new conversation, with this system turn[\s\S]*> ", before)
        user.type("\x04")
        assert user.end() == 0
        assert "Traceback" not in user.shown


def test_a_conversation_remembers_until_it_is_reset(qwen: Path, tmp_path: Path) -> None:
    """Each answer is that to the same turns from a file, greedily in float32."""
    settings = {"HF_MODEL_PATH": qwen, "MAX_NEW_TOKENS": 6, "TEMPERATURE": 0, "DTYPE": "fp32"}
    answers, said = chat(typed="hi\nand you?\n/rest\n/reset\nand you?\n/system Be brief.\nhi\n/exit\nhi\n", **settings)
    assert "/rest is no command; with a space before it, it is text for the model" in said
    assert said.count("(ended at MAX_NEW_TOKENS=6)") == 4

    def answers_to(*rows: dict[str, Any]) -> list[str]:
        path = write_rows(tmp_path / "prompts.jsonl", list(rows))
        return [json.loads(line)["output"] for line in chat(PROMPTS=path, **settings)[0].splitlines()]

    (first,) = answers_to(turns("hi"))
    others = answers_to(turns("hi", first, "and you?"), turns("and you?"), {"system": "Be brief.", **turns("hi")})
    expected = [first, *others]
    assert answers == "".join(f"{text}\n" for text in expected)
    assert len(set(expected)) == 4


def test_a_line_that_is_too_long_leaves_the_conversation_as_it_was(tmp_path: Path) -> None:
    qwen = tiny_qwen(tmp_path / "qwen", max_position_embeddings=80)
    answers, said = chat(typed=f"{'long ' * 50}\nhi\n", HF_MODEL_PATH=qwen, MAX_NEW_TOKENS=4, TEMPERATURE=0)
    assert re.search(r"not answered: it has \d+ tokens, and the model's positions less MAX_NEW_TOKENS leave 76", said)
    assert answers == chat(typed="hi\n", HF_MODEL_PATH=qwen, MAX_NEW_TOKENS=4, TEMPERATURE=0)[0]


def test_a_file_of_prompts_is_answered_row_by_row_alike_at_every_batch_size(qwen: Path, tmp_path: Path) -> None:
    rows = [
        {"id": 1, "instruction": "Be brief.", "input": "1+1?", "output": "2"},
        {"text": "The quick brown fox"},
        {"messages": [{"role": "user", "content": "今天天气很好，我们去公园散步吧。"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "old"}]},
    ]
    path = write_rows(tmp_path / "prompts.jsonl", rows)
    settings = {"HF_MODEL_PATH": qwen, "PROMPTS": path, "MAX_NEW_TOKENS": 20, "TEMPERATURE": 0, "DTYPE": "fp32"}
    alone, together = tmp_path / "new" / "alone.jsonl", tmp_path / "together.jsonl"
    chat(OUTPUT=alone, BATCH_SIZE=1, **settings)
    _, said = chat(OUTPUT=together, BATCH_SIZE=3, **settings)
    assert "4 answers (4 by length) of 80 tokens" in said
    assert alone.read_bytes() == together.read_bytes()
    answers = [json.loads(line) for line in together.read_text(encoding="utf-8").splitlines()]
    first = {name: answers[0].pop(name) for name in ("id", "instruction", "input", "expected")}
    assert first == {"id": 1, "instruction": "Be brief.", "input": "1+1?", "expected": "2"}
    assert answers[1].pop("text") == "The quick brown fox"
    assert answers[2].pop("messages") == rows[2]["messages"]
    assert answers[3].pop("conversations") == rows[3]["conversations"]
    for answer in answers:
        assert answer.keys() == {"output", "finish_reason", "prompt_tokens", "output_tokens"} and answer["output"]
    assert "exists: remove it" in chat(2, OUTPUT=together, **settings)[1]


def test_texts_are_continued_in_a_terminal_too(qwen: Path, tmp_path: Path) -> None:
    settings = {"HF_MODEL_PATH": qwen, "MAX_NEW_TOKENS": 8, "TEMPERATURE": 0, "MODE": "complete"}
    answers, said = chat(typed="The quick\n/reset\n", **settings)
    assert "/reset is for conversations" in said
    path = tmp_path / "prompts.txt"
    path.write_text("The quick\n", encoding="utf-8")
    row = json.loads(chat(PROMPTS=path, **settings)[0])
    assert row["prompt"] == "The quick" and answers == row["output"] + "\n"


def test_settings_without_effect_and_long_prompts_are_refused_before_the_model_is_loaded(
    qwen: Path, tmp_path: Path
) -> None:
    assert "SYSTEM has no effect with MODE=complete" in chat(2, HF_MODEL_PATH=qwen, SYSTEM="S", MODE="complete")[1]
    assert "OUTPUT=o is for the answers to PROMPTS" in chat(2, HF_MODEL_PATH=qwen, OUTPUT="o")[1]
    path = write_rows(tmp_path / "prompts.jsonl", [{"text": "ok"}, {"text": "a b " * 9}])
    small = tiny_qwen(tmp_path / "small", max_position_embeddings=30)
    said = chat(2, HF_MODEL_PATH=small, PROMPTS=path, OUTPUT=tmp_path / "o.jsonl", MAX_NEW_TOKENS=20)[1]
    assert re.search(r"prompts.jsonl, line 2: it has \d+ tokens, .* leave 10", said) and "model: " not in said
    assert not (tmp_path / "o.jsonl").exists()
