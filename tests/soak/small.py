"""Shared by the soak runs: a small model, its data, and the result of an uninterrupted run."""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.conversion import to_hf, to_megatron
from tests.distributed.launch import run, words
from tests.distributed.user import Run
from tests.tiny import TEXTS, tiny_qwen

LAYOUTS = {"tp2_pp2": {"TP": 2, "PP": 2, "GPUS": 4}, "dp2_tp2": {"TP": 2, "GPUS": 4}, "dp2": {"GPUS": 2}}
SIZES = {"PRECISION": "bf16", "SAVE_INTERVAL": 4, "EVAL_INTERVAL": 6, "EVAL_ITERS": 2, "SPLIT": "90,10,0"}
LOSS = re.compile(r"iteration (\d+)/\d+ +(\S+) +(\S+) ")  # loss, grad norm


class Soak:
    """A folder with a model, data, and runs of one layout, whose losses must all be those of the uninterrupted run."""

    def __init__(self, folder: Path, layout: str, **settings: Any) -> None:
        self.folder, self.number = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "start").exists():
            self._prepare()
        paths = {"DATASET_PATH": folder / "text", "LOAD_CHECKPOINT_PATH": folder / "start"}
        self.settings = {**paths, **SIZES, **LAYOUTS[layout], **settings}
        self.losses: dict[int, tuple[str, str]] = {}
        self.compared = 0

    def _prepare(self) -> None:
        tiny_qwen(self.folder / "qwen", std=0.05, spread=0.05)
        rows = (json.dumps({"text": f"{i} " + TEXTS[i % 4] * (1 + i % 3)}) + "\n" for i in range(400))
        (self.folder / "text.jsonl").write_text("".join(rows))
        flags = {"input": self.folder / "text.jsonl", "output_prefix": self.folder / "text", "workers": 1}
        run("-m", "common.preprocess", "pretrain", *words({**flags, "tokenizer_path": self.folder / "qwen"}))
        to_megatron(self.folder / "qwen", self.folder / "start", ckpt_format="torch_dist")

    def start(self, name: str, **more: Any) -> Run:
        """The same command for the run `name`."""
        self.number += 1
        settings = {**self.settings, "SAVE_CHECKPOINT_PATH": self.folder / name, **more}
        return Run(settings, self.folder / f"{name}.{self.number}.log")

    def uninterrupted(self, **more: Any) -> None:
        """Runs it once without a fault, and keeps its losses."""
        log = self.start("uninterrupted", **more).end(0, 3600)
        self.losses = {int(i): (loss, norm) for i, loss, norm in LOSS.findall(log)}

    def compare(self, log: str) -> None:
        """Raises AssertionError unless each logged iteration has the uninterrupted run's loss and gradient norm."""
        for i, loss, norm in LOSS.findall(log):
            assert self.losses[int(i)] == (loss, norm), (i, self.losses[int(i)], (loss, norm))
            self.compared += 1

    def compare_weights(self, *names: str) -> int:
        """How many tensors both exports hold, all equal to the bit; raises AssertionError where one is not."""
        folders = [to_hf(self.folder / each, self.folder / f"{each}_{time.time_ns()}") for each in names]
        expected, found = (load_file(folder / "model.safetensors") for folder in folders)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
        return len(expected)


def arguments(doc: str, default: int) -> argparse.Namespace:
    """--folder, --layout and --number of a soak's command line."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go; removed by hand")
    parser.add_argument("--layout", choices=LAYOUTS, default="dp2")
    parser.add_argument("--number", type=int, default=default, help="of faults (of each kind)")
    parser.add_argument("--async-save", default="false")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()
