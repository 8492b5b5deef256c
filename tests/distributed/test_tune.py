"""Layouts tried by step 3's script: the fastest is a settings file that the script takes."""

import re
import signal
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.distributed.user import ROOT, Run, environment

ROW = re.compile(r"^ *(\d+) +(\d+) +(\d+) +(\d+) +(none|selective|full) +- +[\d.]+ +([\d,]+|-) +-(.*)$", re.M)


def settings(inputs: Path, folder: Path, **more: Any) -> dict[str, Any]:
    """Of a run whose own layout divides no batch: it is not tried."""
    paths = {
        "DATASET_PATH": inputs / "pretrain",
        "LOAD_CHECKPOINT_PATH": inputs / "start",
        "SAVE_CHECKPOINT_PATH": folder,
    }
    return {**paths, "EPOCHS": 1, "MICRO_BATCH_SIZE": 3, **more}


def test_the_fastest_of_the_layouts_that_fit_is_a_settings_file(inputs: Path, tmp_path: Path) -> None:
    """One GPU, batches of 2: micro-batches of 1 and of 2. Nothing is left but the file."""
    output, given = tmp_path / "tuned.env", settings(inputs, tmp_path / "run", GPUS=1, GLOBAL_BATCH_SIZE=2)
    with TemporaryDirectory(dir="/tmp") as scratch:  # a short path, for sockets
        log = Run({**given, "TMPDIR": scratch}, tmp_path / "log", ("--tune", str(output))).end(0)
        assert not any(Path(scratch).iterdir())
    rows = {row[:5]: float(row[5].replace(",", "")) for row in ROW.findall(log) if row[5] != "-"}
    assert {row[:4] for row in rows} == {("1", "1", "1", "1"), ("1", "1", "1", "2")}, log[-4000:]
    best = max(rows, key=lambda row: rows[row])
    lines = dict(line.split("=", 1) for line in output.read_text().splitlines() if not line.startswith("#"))
    assert (lines["TP"], lines["PP"], lines.get("VPP", "1"), lines["MICRO_BATCH_SIZE"]) == best[:4]
    assert (lines["GPUS"], lines["GLOBAL_BATCH_SIZE"]) == ("1", "2") and f"{max(rows.values()):,.0f} tokens/s" in log
    assert not (tmp_path / "run").exists()
    checked = subprocess.run(
        ["bash", ROOT / "cpu" / "3_run_mcore_qwen.sh", "--", "--check"], capture_output=True, text=True, check=True,
        env={name: value for name, value in environment({**given, "SETTINGS": str(output)}).items()
             if name not in ("TP", "PP", "MICRO_BATCH_SIZE", "SEQ_LENGTH", "GLOBAL_BATCH_SIZE")},
    )  # fmt: skip
    assert "ok: the run can start" in checked.stdout and f"TP {best[0]} x PP {best[1]}" in checked.stderr


def test_a_killed_tuning_leaves_no_process(inputs: Path, tmp_path: Path) -> None:
    tuning = Run(settings(inputs, tmp_path / "run", GPUS=2), tmp_path / "log", ("--tune", str(tmp_path / "tuned.env")))
    tuning.wait_for("trial 1 of")
    while len(tuning.processes()) < 5:  # the trial's launcher, its ranks and their workers
        assert tuning.process.poll() is None
    tuning.process.send_signal(signal.SIGKILL)
    tuning.end(-signal.SIGKILL)
    assert not (tmp_path / "tuned.env").exists()
