"""SIGKILL at random moments of step 2, by its script: python -m tests.soak.conversions --folder /tmp/soak --number 50

Each kill is followed by the same command, whose output must be that of an uninterrupted run, to the byte.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from common.checkpoint.formats.checkpoint_paths import find_checkpoint
from tests.tiny import tiny_qwen

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cpu" / "2_convert_between_hf_megatron.sh"
LARGE = {"hidden_size": 256, "vocab_size": 20_000}  # so that kills hit half-written files, too


class Conversion:
    """A direction, and what it writes when nothing goes wrong."""

    def __init__(self, source: Path, target: Path, log: Path, **settings: str) -> None:
        self.target, self._log = target, log
        paths = {"LOAD_CHECKPOINT_PATH": str(source), "SAVE_CHECKPOINT_PATH": str(target)}
        self._environment = {**os.environ, "PYTHON": sys.executable, **paths, **settings}
        begun = time.monotonic()
        assert self.start().wait(600) == 0, log.read_text()
        self.seconds, self.whole = time.monotonic() - begun, tree(target)
        shutil.rmtree(target)

    def start(self) -> subprocess.Popen[bytes]:
        """The command, in a group of its own."""
        with self._log.open("ab") as log:
            return subprocess.Popen(
                ["bash", SCRIPT], env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self, rng: random.Random) -> bool:
        """Whether a kill at a random moment hit it; then the same command gave the expected output."""
        process, begun = self.start(), time.monotonic()
        try:
            process.wait(self.seconds * rng.uniform(0.4, 1.0))
        except subprocess.TimeoutExpired:
            met = True
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)
        else:
            met = False
            self.seconds = time.monotonic() - begun  # the machine is less busy than it was
        if not self.finished():
            assert not self.target.is_dir() or find_checkpoint(self.target) is None
            assert self.start().wait(600) == 0, self._log.read_text()
        assert tree(self.target) == self.whole
        shutil.rmtree(self.target)
        return met

    def finished(self) -> bool:
        """Whether nothing is left to do: the marker of unfinished work is gone."""
        return (self.target / "config.json").exists() and not (self.target / ".unfinished.json").exists()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def conversions(folder: Path) -> list[Conversion]:
    """Both formats of Megatron, and back."""
    source = tiny_qwen(folder / "source", **LARGE)
    there = {"CONVERT_TYPE": "huggingface-to-megatron"}
    dist = Conversion(source, folder / "dist", folder / "log", **there)
    assert dist.start().wait(600) == 0
    megatron = (folder / "dist").rename(folder / "megatron")
    back = {"CONVERT_TYPE": "megatron-to-huggingface", "MAX_SHARD_SIZE": "3MB"}
    return [
        dist,
        Conversion(source, folder / "torch", folder / "log", **there, CKPT_FORMAT="torch", TP="2", PP="2"),
        Conversion(megatron, folder / "back", folder / "log", **back),
    ]


def kill_all(folder: Path, number: int, seed: int) -> int:
    """The number of runs that were killed, alternating the directions; raises AssertionError for a fault."""
    rng, each, kills = random.Random(seed), conversions(folder), 0
    while kills < number:
        kills += each[kills % len(each)].kill(rng)
    return kills


def main() -> None:
    """Kills, compares, and prints the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go; removed by hand")
    parser.add_argument("--number", type=int, default=50, help="of kills")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    print(f"{kill_all(given.folder, given.number, given.seed)} kills, all outputs are those of uninterrupted runs")


if __name__ == "__main__":
    main()
