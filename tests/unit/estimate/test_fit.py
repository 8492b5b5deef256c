"""The constants: those in the source are fitted to the committed measurements, and a fit recovers known constants."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.estimate import constants
from tests.bench import fit_estimate
from tests.bench.fit_estimate import DATA, GIB, MIB, read_steps
from tests.unit.estimate.ranks import SHAPE

BIG = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 8192,
}  # fmt: skip
SHAPES = {"0.5B": {**SHAPE, **BIG, "num_attention_heads": 32}, "3B": {**SHAPE, **BIG, "num_hidden_layers": 24}}
KINDS = (("transformer_engine", "false"), ("local", "false"), ("transformer_engine", "true"))
CASES = [(shape, mbs, gbs, *kind) for shape in SHAPES for mbs, gbs in ((1, 8), (2, 8), (4, 4), (1, 64))
         for kind in KINDS]  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, path: Path) -> int:
    monkeypatch.setattr("sys.argv", ["fit_estimate", str(path)])
    return fit_estimate.main()


def write(path: Path, **changes: Any) -> Path:
    """Rows of steps as the estimate itself has them, and one of another length."""
    rows = [
        {
            "gpu": "H100",
            "shape": shape,
            "seq": 4096,
            "mbs": mbs,
            "gbs": gbs,
            "impl": impl,
            "fused_products": fused,
            "recompute": "none",
            "allocated_gib": 1.0,
        }
        for shape, mbs, gbs, impl, fused in CASES
    ]
    rows.append({**rows[0], "seq": 8192})
    path.write_text(json.dumps({"shapes": SHAPES, "rows": rows}))
    for row, step in zip(rows, read_steps(path), strict=True):
        assert step.estimate.speed
        row["allocated_gib"] = step.peak / GIB
        row["reserved_gib"] = row["allocated_gib"] * constants.RESERVED_SHARE
        row["tokens_per_s"] = step.estimate.speed.tokens_per_second
    rows[-1].update(changes)
    path.write_text(json.dumps({"shapes": SHAPES, "rows": rows}))
    return path


def test_the_constants_are_those_of_the_committed_measurements(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, DATA) == 0, capsys.readouterr().out


def test_a_fit_recovers_the_constants_behind_the_figures(tmp_path: Path) -> None:
    path = write(tmp_path / "steps.json")
    steps = [step for step in read_steps(path) if step.fitted]
    assert len(steps) == len(CASES)
    assert fit_estimate.fit_seconds(steps) == pytest.approx(constants.SECONDS, rel=0.02, abs=1e-5)
    assert fit_estimate.fit_workspace(steps) == constants.WORKSPACE_BYTES
    assert fit_estimate.fit_reserved(steps) == pytest.approx(constants.RESERVED_SHARE)
    for step in steps:
        step.row["allocated_gib"] += 100 * MIB / GIB
        step.row["reserved_gib"] *= 1.01
    more = {impl: size + 100 * MIB for impl, size in constants.WORKSPACE_BYTES.items()}
    assert fit_estimate.fit_workspace(steps) == more
    assert fit_estimate.fit_reserved(steps) == pytest.approx(1.01 * constants.RESERVED_SHARE, rel=0.02)


@pytest.mark.parametrize(("share", "code"), [(1.09, 0), (1.12, 1), (0.88, 1)])
def test_a_judged_peak_that_is_far_off_fails(
    share: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fit_estimate, "fit_seconds", lambda steps: constants.SECONDS)
    peak = read_steps(write(tmp_path / "steps.json"))[-1].row["allocated_gib"]
    assert run(monkeypatch, write(tmp_path / "steps.json", allocated_gib=peak * share)) == code
    assert "judged: 1 steps, the worst peak off by" in capsys.readouterr().out


def test_other_constants_than_the_measured_ones_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "steps.json")
    monkeypatch.setattr(constants, "RESERVED_SHARE", 1.5)
    assert run(monkeypatch, path) == 1
    assert "constants.py holds other RESERVED_SHARE" in capsys.readouterr().out
