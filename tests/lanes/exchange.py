"""Checkpoints from lane to lane, for tests/lanes.sh, which runs each command with the Python of a lane:

    python -m tests.lanes.exchange prepare FOLDER         a model and data, for all lanes
    python -m tests.lanes.exchange save FOLDER LANE       a run stopped halfway, and the same run uninterrupted
    python -m tests.lanes.exchange resume FOLDER LANE     LANE resumes the runs of every lane that saved

A resumed run must give the saving lane's own losses, or be refused for its optimizer's layout.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common.ports import free_port
from tests.conversion import to_megatron
from tests.distributed.launch import environment, run, steps, train, words
from tests.end_to_end.steps import chats, write_rows
from tests.tiny import tiny_qwen

FORMATS = ("torch_dist", "torch")
HALF, WHOLE = 4, 8
REFUSED = "holds the optimizer as"  # the one word with which a run may be refused here
BOUND = 1e-4  # of a loss: other versions sum in another order
SETTINGS = {
    "train_mode": "finetune", "seq_length": 96, "micro_batch_size": 2, "global_batch_size": 8, "precision": "fp32",
    "log_interval": 1, "lr": 1e-3, "min_lr": 1e-4, "split": "100,0,0", "tp": 2, "gpus": 2,
    "train_iters": WHOLE,
}  # fmt: skip


def prepare(folder: Path) -> None:
    """Writes what every lane trains on."""
    shutil.rmtree(folder, ignore_errors=True)
    qwen = tiny_qwen(folder / "qwen", std=0.05, spread=0.05)
    flags = {"input": write_rows(folder / "rows.jsonl", chats(200)), "output_prefix": folder / "data"}
    run("-m", "common.preprocess", "sft", *words({**flags, "tokenizer_path": qwen, "workers": 1}))
    for ckpt_format in FORMATS:
        layout = {"tp": 2} if ckpt_format == "torch" else {}
        to_megatron(qwen, folder / f"start_{ckpt_format}", ckpt_format=ckpt_format, **layout)


def flags_of(folder: Path, ckpt_format: str, **more: Any) -> dict[str, Any]:
    start = folder / f"start_{ckpt_format}"
    paths = {"dataset_path": folder / "data", "load_checkpoint_path": start, "ckpt_format": ckpt_format}
    return {**SETTINGS, **paths, **more}


def save(folder: Path, lane: str) -> None:
    """Writes folder/saved/LANE/FORMAT and the losses of the uninterrupted run beside it."""
    target = folder / "saved" / lane
    shutil.rmtree(target, ignore_errors=True)
    for ckpt_format in FORMATS:
        train(**flags_of(folder, ckpt_format, save_checkpoint_path=target / ckpt_format, exit_interval=HALF))
        uninterrupted = train(**flags_of(folder, ckpt_format, save_checkpoint_path=target / "uninterrupted"))
        (target / f"{ckpt_format}.json").write_text(json.dumps(steps(uninterrupted)[HALF:]))
        shutil.rmtree(target / "uninterrupted")


def resume(folder: Path, lane: str) -> bool:
    """Prints a line for each lane and format; returns whether each resumed or was refused."""
    well = True
    for losses in sorted(folder.glob("saved/*/*.json")):
        ckpt_format, saver = losses.stem, losses.parent.name
        work = folder / "work" / lane
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(losses.parent / ckpt_format, work)
        flags = flags_of(folder, ckpt_format, save_checkpoint_path=work, master_port=free_port())
        done = subprocess.run(
            [sys.executable, "-m", "common.train", *words(flags)], env=environment(), text=True, timeout=300,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        result = outcome(done.returncode, done.stdout, json.loads(losses.read_text()))
        well = well and not result.startswith("FAILED")
        print(f"| {saver} | {lane} | {ckpt_format} | {result} |", flush=True)
    return well


def outcome(status: int, log: str, expected: list[list[float]]) -> str:
    """The result of a resumed run."""
    if status == 2 and REFUSED in log:
        return f"refused: {log[log.index(REFUSED) :].splitlines()[0].split(':')[0]}"
    found = steps(log)
    if status or [i for i, _, _ in found] != [i for i, _, _ in expected]:
        return f"FAILED: exit code {status}: {' / '.join(log.splitlines()[-3:])}"
    difference = max(abs(loss - theirs[1]) for (_, loss, _), theirs in zip(found, expected, strict=True))
    return f"{'goes on' if difference <= BOUND else 'FAILED: goes on elsewhere'}, losses within {difference:.1e}"


def main() -> None:
    command, folder, *lane = sys.argv[1:]
    if command == "resume":
        sys.exit(not resume(Path(folder), *lane))
    {"prepare": prepare, "save": save}[command](Path(folder), *lane)


if __name__ == "__main__":
    main()
