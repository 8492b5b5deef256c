"""SIGKILL of step 1 at random moments: python -m tests.soak.preprocess --folder /tmp/soak --number 50

Its script is killed with all its processes, at a random time within the duration of an uninterrupted run; the
same command resumes each time, and its final output is that of the uninterrupted run, to the byte.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

from tests.tiny import TEXTS, tiny_qwen

SCRIPT = Path(__file__).parents[2] / "cpu" / "1_preprocess_pretrain.sh"


class Step1:
    """Step 1 of made-up rows in `folder`, by its script, in several parts."""

    def __init__(self, folder: Path, num_rows: int) -> None:
        self.folder = folder
        (folder / "in").mkdir(parents=True)
        tiny_qwen(folder / "qwen")
        for name, share in (("a.jsonl", 3), ("b.jsonl", 1)):
            rows = (json.dumps({"text": f"{name} {i} {TEXTS[i % 4] * (i % 9)}"}) for i in range(num_rows * share // 4))
            (folder / "in" / name).write_text("\n".join(rows) + "\n", encoding="utf-8")

    def start(self, name: str) -> subprocess.Popen[str]:
        """The same command for the output `name`."""
        settings = {
            "INPUT": self.folder / "in", "OUTPUT_PREFIX": self.folder / name / "data", "WORKERS": 2,
            "TOKENIZER_PATH": self.folder / "qwen", "TOKENIZER_ENGINE": "tokenizers", "PARTITIONS": 4,
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", str(SCRIPT)], env={**os.environ, **{key: str(value) for key, value in settings.items()}},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def end(self, name: str) -> float:
        """Seconds of a complete run; raises AssertionError unless it succeeds."""
        started = time.monotonic()
        process = self.start(name)
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        return time.monotonic() - started

    def kill(self, name: str, after_s: float) -> bool:
        """Whether a run was killed after `seconds`, and had not ended before."""
        process = self.start(name)
        try:
            process.communicate(timeout=after_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return True
        assert process.returncode == 0
        return False

    def written(self, name: str) -> dict[str, bytes]:
        """The files of the folder `name`, all of them finished."""
        return {path.name: path.read_bytes() for path in (self.folder / name).iterdir()}


def soak(folder: Path, number: int, seed: int, num_rows: int) -> str:
    """Kills `number` runs, each resumed by the next; returns what was seen, or raises AssertionError."""
    rng, step, kills, rounds = random.Random(seed), Step1(folder, num_rows), 0, 0
    total_s = step.end("uninterrupted")
    while kills < number:
        rounds += 1
        name = f"killed_{rounds}"
        while kills < number and step.kill(name, rng.uniform(0.2, 1) * total_s):
            kills += 1
        step.end(name)
        assert step.written(name) == step.written("uninterrupted"), name
    return f"{kills} kills in {rounds} runs: each ended as the uninterrupted one, to the byte"


def main() -> None:
    """Kills, compares, and prints the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="a new folder; removed by hand")
    parser.add_argument("--number", type=int, default=50, help="of kills")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=100_000)
    given = parser.parse_args()
    print(soak(given.folder, given.number, given.seed, given.rows))


if __name__ == "__main__":
    main()
