"""`python -m common.estimate`: its output, what it refuses, and that it needs neither torch nor a GPU."""

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from common import errors
from common.estimate.__main__ import main
from common.estimate.constants import CONTEXT_BYTES, GIB, RESERVED_SHARE
from tests.unit.estimate.ranks import ROOT, write_config


def words_of(flags: dict[str, Any]) -> list[str]:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items() if value is not True]
    return words + [f"--{name}" for name, value in flags.items() if value is True]


def run(expect: int = 0, **flags: Any) -> str:
    """What the command prints, on stderr if it is to be refused; in this process, as a new one is slow to start."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with patch.object(sys, "argv", ["estimate", *words_of(flags)]), redirect_stdout(out), redirect_stderr(err):
        try:
            errors.run(main)
        except SystemExit as end:
            code = end.code
    assert code == expect, err.getvalue()
    return err.getvalue() if expect else out.getvalue()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Of the size of a 7B model, so that some layouts fit a GPU and some do not."""
    shape = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    more = {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}
    return write_config(tmp_path, **shape, **more, max_position_embeddings=32768)


def test_layouts_that_fit_come_first_and_all_are_counted(model: Path) -> None:
    options = {"hf_model_path": model, "gpu": "h100", "gpus": 8, "seq_length": 4096, "global_batch_size": 64}
    result = json.loads(run(**options, json=True, tokens=1e9))
    assert result["parameters"] == 7_615_616_512 and result["gpu"]["name"] == "H100"
    fits = [layout["fits"] for layout in result["layouts"]]
    assert fits == sorted(fits, key=["yes", "tight", "no"].index) and {"yes", "no"} <= {*fits}
    rates = [layout["tokens_per_s"] for layout in result["layouts"] if layout["fits"] == "yes"]
    assert rates == sorted(rates, reverse=True)
    best = result["layouts"][0]
    assert best["days"] == pytest.approx(1e9 / best["tokens_per_s"] / 86400)
    assert best["step_s"] == pytest.approx(64 * 4096 / best["tokens_per_s"])
    assert best["peak_bytes"] == max(stage["peak"] for stage in best["stages"])
    assert len(best["stages"]) == best["pp"]
    assert {layout["tp"] * layout["pp"] * layout["dp"] for layout in result["layouts"]} == {8}
    text = run(**options, tokens=1e9)
    counted = re.search(r"(\d+) layouts: (\d+) fit, (\d+) are tight, (\d+) need more memory; 12 shown", text)
    assert counted and [int(number) for number in counted.groups()] == [
        len(fits), fits.count("yes"), fits.count("tight"), fits.count("no"),
    ]  # fmt: skip
    assert f"{len(result['refused'])} layouts are refused" in text
    assert "x TP=8 does not divide num_attention_heads=28 of this model: use TP in [1, 2, 4]" in text
    assert len(text.split("\n\n")[1].splitlines()) == 1 + 12
    assert len(run(**options, rows=0).split("\n\n")[1].splitlines()) == 1 + len(fits)


def test_one_layout_is_shown_stage_by_stage(model: Path) -> None:
    layout = {"tp": 2, "pp": 4, "micro_batch_size": 1, "recompute": "full"}
    text = run(hf_model_path=model, gpu="A100 40GB", gpus=8, global_batch_size=64, **layout)
    _, row, stages, notes = text.split("\n\n")
    assert len(row.splitlines()) == 2 and len(stages.splitlines()) == 5
    peaks = [float(line.split()[-1]) for line in stages.splitlines()[1:]]
    assert row.splitlines()[1].split()[-4] == f"{max(peaks):.2f}"
    # The first stage has more micro-batches in flight, the last one the output layer and its loss.
    assert peaks[0] > peaks[1] > peaks[2] < peaks[3]
    assert (
        "speed was measured on H100 and H200; here" in notes
        and "H200 of a host speed was within 20% of this; the bandwidth of links is assumed" in notes
    )


def test_a_gpu_without_known_rates_has_no_speed(model: Path) -> None:
    text = run(hf_model_path=model, gpu="C500", gpus=8, global_batch_size=64, tokens=1e9)
    assert "note: the rates of C500 are not known here" in text and "not run on metax hardware" in text
    assert "local layers" in text and "tokens/s" in text
    rows = text.split("\n\n")[1].splitlines()
    assert rows[0].endswith("tokens/s  days  PIPELINE_LAYERS")
    assert all(re.search(r"  -     -(  [\d,]+)?$", row) for row in rows[1:])


def test_the_optimizers_state_can_be_smaller(model: Path) -> None:
    one = {"hf_model_path": model, "gpu": "H200", "tp": 1, "pp": 1, "micro_batch_size": 1, "recompute": "full"}
    kinds = ("fp32", "bf16", "cpu_bf16", "cpu")
    layouts = {kind: json.loads(run(**one, json=True, optimizer_state=kind))["layouts"][0] for kind in kinds}
    sizes = {kind: layout["stages"][0]["state"]["optimizer"] for kind, layout in layouts.items()}
    parameters = layouts["fp32"]["stages"][0]["parameters"]
    assert sizes == {"fp32": 12 * parameters, "bf16": 6 * parameters, "cpu_bf16": 0, "cpu": 0}
    rates = [layouts[kind]["tokens_per_s"] for kind in kinds]
    assert rates[0] == rates[1] > rates[2] > rates[3]
    for kind, size in (("cpu", 12), ("cpu_bf16", 6)):
        kept = size * parameters / 2**30
        text = f"note: OPTIMIZER_STATE={kind} keeps {kept:,.1f} GiB in the memory of the hosts"
        assert text in run(**one, optimizer_state=kind)


def test_it_says_which_layers_of_each_stage_are_faster_and_by_how_much(model: Path, tmp_path: Path) -> None:
    """Even with PP given, where a line has them; in the layout where PP is searched."""
    given = {"hf_model_path": model, "gpu": "H200", "gpus": 4, "seq_length": 4096, "global_batch_size": 32}
    given |= {"tp": 1, "micro_batch_size": 1, "recompute": "none", "vpp": 1}
    text = run(**given, pp=4)
    line = re.search(r"^PIPELINE_LAYERS=([\d,]+): (\d+)% faster, as the last .*; ([\d.]+) GiB per GPU$", text, re.M)
    assert line and line[1] == "7,8,8,5" and "  PIPELINE_LAYERS" not in text
    even, split = (
        json.loads(run(**given, pp=4, json=True, **more))["layouts"][0] for more in ({}, {"pipeline_layers": line[1]})
    )
    assert float(line[2]) == round(100 * (split["tokens_per_s"] / even["tokens_per_s"] - 1)) > 5
    assert float(line[3]) == round(split["peak_bytes"] / GIB, 2)
    assert split["stages"][1]["peak"] > even["stages"][1]["peak"]
    assert (even["pipeline_layers"], split["pipeline_layers"]) == (None, line[1])
    assert "faster" not in run(**given, pp=4, pipeline_layers=line[1]) and "faster" not in run(**given, pp=1)
    written = tmp_path / "four.env"
    searched = run(**{**given, "global_batch_size": 4, "micro_batch_size": 4}, write_settings=written)
    header, first = searched.split("\n\n")[1].splitlines()[:2]
    assert header.endswith("  days  PIPELINE_LAYERS") and first.endswith("     -  7,8,8,5") and "faster" not in searched
    assert "PIPELINE_LAYERS=7,8,8,5\n" in written.read_text()
    assert re.search(r"The least memory: TP=1 PP=4 .* PIPELINE_LAYERS=7,8,8,5, ", searched)


def test_layers_that_are_not_recomputed_keep_more_and_are_faster(model: Path) -> None:
    one = {"hf_model_path": model, "gpu": "H200", "tp": 1, "pp": 1, "micro_batch_size": 1, "recompute": "full"}
    layouts = [json.loads(run(**one, json=True, recompute_num_layers=number))["layouts"][0] for number in (28, 20, 10)]
    for name in ("peak_bytes", "tokens_per_s"):
        all_of_them, most, some = (layout[name] for layout in layouts)
        assert all_of_them < most < some
    assert layouts[0]["peak_bytes"] == json.loads(run(**one, json=True))["layouts"][0]["peak_bytes"]


def test_context_parallelism_divides_the_tokens_and_is_noted_as_measured_at_2(model: Path) -> None:
    options = {"hf_model_path": model, "gpu": "H200", "gpus": 2, "tp": 1, "pp": 1, "recompute": "none"}
    options |= {"micro_batch_size": 1, "seq_length": 16384}
    one, two = (json.loads(run(**options, json=True, cp=cp))["layouts"][0] for cp in (1, 2))
    assert one["stages"][0]["kept"] == 2 * two["stages"][0]["kept"]
    assert one["stages"][0]["state"] == two["stages"][0]["state"]  # spread over DP x CP
    note = "note: context parallelism was measured at CP=2, one document a row; the time of its communication is "
    assert f"{note}not counted" in run(**options, cp=2) and note not in run(**options, cp=1)
    packed = {**options, "packing": "true", "cp": 2}
    assert f"{note}counted as if" in run(**packed)
    text = run(**{**options, "packing": "true", "gpus": 4, "tp": 2})  # CP=1 first, with Transformer Engine's attention
    assert text.split("\n\n")[1].splitlines()[1].split()[3] == "1"
    assert f"{note}counted as if" in text and "attention within samples (PACKING) was not measured" in text
    ring, gathered = (json.loads(run(**each, json=True))["layouts"][0] for each in ({**options, "cp": 2}, packed))
    # Keys and values of the whole row, and the output of each part.
    more = 28 * 2 * (2 * 16384 * 512 // 2 + 16384 * 3584 // 2)
    assert gathered["stages"][0]["kept"] - ring["stages"][0]["kept"] == pytest.approx(more, rel=0.01)


def test_long_rows_get_their_context_parallelism_and_short_ones_none(tmp_path: Path, model: Path) -> None:
    """7B on 8 GPUs at 128K tokens: 4 GPUs to a row. The table has CP where it is searched or given."""
    options = {"hf_model_path": model, "gpu": "H100", "gpus": 8, "global_batch_size": 16, "seq_length": 131072}
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 131072}))
    result = json.loads(run(**options, json=True))
    layouts = [(one["tp"], one["pp"], one["vpp"], one["recompute"], one["cp"], one["micro_batch_size"])
               for one in result["layouts"]]  # fmt: skip
    assert result["settings"]["cp"] is None and {one["cp"] for one in result["layouts"]} == {1, 2, 4, 8}
    assert layouts[0] == (1, 1, 1, "full", 4, 1)
    written = tmp_path / "best.env"
    text = run(**options, write_settings=written)
    header, first = (line.split() for line in text.split("\n\n")[1].splitlines()[:2])
    assert (header[:5], first[:5]) == (["TP", "PP", "VPP", "CP", "DP"], ["1", "1", "1", "4", "2"])
    assert "CP=4\n" in written.read_text() and "note: context parallelism was measured at CP=2" in text
    place = {layout: number for number, layout in enumerate(layouts)}
    needless = [one for one in layouts if place.get((*one[:4], one[4] / 2, one[5] / 2), len(place)) < place[one]]
    assert f"\n{len(needless)} of them are left out of the table: half of their CP" in text and needless
    shown = [tuple(line.split()[:4]) for line in text.split("\n\n")[1].splitlines()[1:]]
    assert len(shown) == 12 and shown.count(("1", "1", "1", "8")) == 1  # with one row at a time, not with two too
    everything = run(**options, rows=0)
    assert len(everything.split("\n\n")[1].splitlines()) == 1 + len(layouts) and "are left out" not in everything
    short = run(**{**options, "seq_length": 8192}, write_settings=written)
    assert " CP " not in short.split("\n\n")[1] and "CP=" not in written.read_text() and "context" not in short
    assert " CP " in run(**{**options, "seq_length": 8192, "cp": 2}).split("\n\n")[1]


def test_packing_is_noted_as_measured_at_2(model: Path) -> None:
    options = {"hf_model_path": model, "gpu": "H200", "gpus": 8, "transformer_impl": "local"}
    assert "note: the kit's own attention within samples (PACKING) was not measured" in run(**options, packing="true")
    assert "PACKING" not in run(**options)


def test_a_layout_fits_tightly_between_what_is_allocated_and_what_the_allocator_holds(model: Path) -> None:
    one = {"hf_model_path": model, "gpu": "H200", "tp": 1, "pp": 1, "micro_batch_size": 1, "recompute": "full"}
    layout = json.loads(run(**one, json=True))["layouts"][0]
    context, held = CONTEXT_BYTES / GIB, layout["peak_bytes"] * RESERVED_SHARE / GIB
    sizes = {"yes": held + context + 0.01, "tight": held + context - 0.01, "no": layout["peak_bytes"] / GIB + context}
    sizes["no"] -= 0.01
    for fits, memory in sizes.items():
        assert json.loads(run(**one, json=True, memory_gib=memory))["layouts"][0]["fits"] == fits


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"gpu": "B100"}, r"--gpu B100 is not known: use one of C500, C550, H200, H100, .*, or the nearest of them"),
        ({"tp": 8, "gpus": 8}, r"TP=8 does not divide num_attention_heads=28 of this model: use TP in \[1, 2, 4\]"),
        ({"tp": 2, "pp": 2, "gpus": 2}, r"2 GPUs \(GPUS x NNODES\) cannot be divided by TP=2 x PP=2"),
        ({"pp": 8, "gpus": 8}, r"28 layers cannot be divided by PP=8 .* PIPELINE_LAYERS=4,4,4,4,3,3,3,3"),
        ({"vpp": 2, "pp": 1}, r"VPP=2 needs pipeline stages, but PP=1"),
        ({"micro_batch_size": 3}, r"GLOBAL_BATCH_SIZE=16 cannot be divided by MICRO_BATCH_SIZE=3 x 1"),
        ({"seq_length": 65536}, r"SEQ_LENGTH=65536 exceeds max_position_embeddings=32768"),
        ({"gpu": "C500", "fused_products": "true"}, r"FUSED_PRODUCTS=true needs an NVIDIA GPU, and this is metax"),
        ({"tokens": 0}, r"TOKENS=0\.0: it must be above 0"),
        ({"memory_gib": -1}, r"MEMORY_GIB=-1\.0: it must be above 0"),
        ({"tp": 4, "gpus": 2}, r"2 GPUs \(GPUS x NNODES\) cannot be divided by TP=4 x PP=1"),
        ({"cp": 3, "gpus": 8}, r"8 GPUs \(GPUS x NNODES\) cannot be divided by TP=1 x PP=1 x CP=3"),
        ({"tp": 0}, r"TP=0: it must be at least 1"),
        ({"gpus": 0}, r"GPUS=0: it must be at least 1"),
        ({"rows": -1}, r"ROWS=-1: it must not be negative"),
        ({"keep_checkpoints": -1}, r"KEEP_CHECKPOINTS=-1: it must not be negative"),
        ({"save_stall_s": -1}, r"SAVE_STALL_S=-1\.0: it must not be negative"),
        ({"save_interval": 0}, r"SAVE_INTERVAL=0: it must be at least 1"),
        ({"disk_gb_s": 0}, r"DISK_GB_S=0\.0: it must be above 0"),
        ({"gpu_mtbf_hours": 0}, r"GPU_MTBF_HOURS=0\.0: it must be above 0"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(model: Path, flags: dict[str, Any], message: str) -> None:
    assert re.search(message, run(expect=2, **{"hf_model_path": model, "gpu": "H100", **flags}))


@pytest.mark.parametrize(("expect", "pp"), [(0, 4), (2, 3)])
def test_a_process_of_its_own_prints_the_same(model: Path, expect: int, pp: int) -> None:
    flags = {"hf_model_path": model, "gpu": "H200", "gpus": 4, "tp": 1, "pp": pp, "global_batch_size": 32}
    command = [sys.executable, "-m", "common.estimate", *words_of(flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == expect and (done.stderr if expect else done.stdout) == run(expect, **flags)
    assert bool(done.stderr) == bool(expect) != bool(done.stdout)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path} has no config.json" in run(expect=2, hf_model_path=tmp_path, gpu="H100")


def test_it_loads_neither_torch_nor_megatron(model: Path) -> None:
    program = f"""
import runpy, sys
sys.argv = ["estimate", "--hf-model-path={model}", "--gpu=H100", "--gpus=8"]
runpy.run_module("common.estimate", run_name="__main__", alter_sys=True)
"""
    check = "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'megatron', 'numpy')])"
    done = subprocess.run([sys.executable, "-c", program + check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "fit, " in done.stdout and done.stdout.splitlines()[-1] == "[]"


def test_it_shows_the_checkpoint_and_the_best_save_interval_of_the_first_layout(model: Path) -> None:
    options = {
        "hf_model_path": model,
        "gpu": "H100",
        "gpus": 8,
        "nnodes": 8,
        "seq_length": 4096,
        "global_batch_size": 256,
    }
    result = json.loads(run(**options, json=True, disk_gb_s=4))
    checkpoint, first = result["checkpoint"], result["layouts"][0]
    assert checkpoint["bytes"] == 14 * 7_615_616_512 and checkpoint["disk_bytes"] == 4 * checkpoint["bytes"]
    assert checkpoint["write_s"] == checkpoint["stall_s"] == checkpoint["bytes"] / 4e9
    assert checkpoint["between_faults_s"] == pytest.approx(50_677 * 3600 / 64)
    assert checkpoint["recovery_s"] == 600 + 120 + checkpoint["write_s"]
    assert abs(first["best_save_interval"] - checkpoint["best_interval_s"] / first["step_s"]) < 1
    assert first["goodput"] < first["best_goodput"] <= checkpoint["best_goodput"] < 1
    text = run(**options, disk_gb_s=4)
    assert "a checkpoint: 106.6 GB with the optimizer; KEEP_CHECKPOINTS=3 and the next one need 426.5 GB" in text
    assert "written in 26.7 s, read in the same time (--disk-gb-s=4); training is paused meanwhile" in text
    assert (
        "64 GPUs have a fault every 33 days (--gpu-mtbf-hours=50,677), detected in 10 min; restarted in 2 min" in text
    )
    line = r"best: SAVE_INTERVAL=(\d+) \(([\d.]+) h .*?: goodput ([\d.]+)%, and ([\d.]+)% with 100"
    best, hours, trains, now = re.findall(line, text)[0]
    assert int(best) == first["best_save_interval"]
    assert float(hours) == pytest.approx(int(best) * first["step_s"] / 3600, abs=0.01)
    assert [trains, now] == [f"{100 * first[name]:.1f}" for name in ("best_goodput", "goodput")]


def test_cheap_saves_are_made_more_often(model: Path) -> None:
    options = {"hf_model_path": model, "gpu": "H100", "gpus": 8, "tp": 2, "pp": 1, "micro_batch_size": 1}
    waits, goes_on = (
        json.loads(run(**options, json=True, **flags))["layouts"][0] for flags in ({}, {"save_stall_s": 5.0})
    )
    assert goes_on["best_save_interval"] < waits["best_save_interval"]
    assert goes_on["best_goodput"] > waits["best_goodput"]
    shown = run(**options, save_stall_s=5, save_interval=7, keep_checkpoints=0, precision="fp32")
    assert "121.8 GB with the optimizer; KEEP_CHECKPOINTS=0\n" in shown
    assert "training is paused for 5 s (--save-stall-s)" in shown and "% with 7;" in shown


def test_without_a_known_step_time_the_best_interval_is_given_as_a_duration(model: Path) -> None:
    for gpu, flags in (("C500", {}), ("H100", {"optimizer_state": "fp32", "tp": 1, "pp": 1, "gpus": 1})):
        text = run(**{"hf_model_path": model, "gpu": gpu, "gpus": 8, **flags})
        assert re.search(r"best: [\d.]+ (h|days) from save to save: goodput 99\.\d%", text)
    layout = json.loads(run(hf_model_path=model, gpu="C500", gpus=8, json=True))["layouts"][0]
    assert layout["best_save_interval"] is layout["best_goodput"] is layout["goodput"] is None


def test_a_gpu_without_rates_has_its_layouts_in_the_order_of_assumed_ones(model: Path) -> None:
    options = {"hf_model_path": model, "gpu": "C500", "gpus": 8, "seq_length": 4096, "global_batch_size": 64}
    layouts = json.loads(run(**options, json=True))["layouts"]
    fits = [layout for layout in layouts if layout["fits"] == "yes"]
    assert all(layout.get("tokens_per_s") is None for layout in layouts)
    least = min(fits, key=lambda layout: layout["peak_bytes"])  # recomputes everything, on many stages
    assert fits[0]["recompute"] == "none" and fits[0]["pp"] < least["pp"] and fits.index(least) > len(fits) / 2
    assert "speed is not estimated; layouts are in the order that A100's rates give" in run(**options)


@pytest.mark.parametrize("gpu", ["4090", "rtx 4090", "L40S", "A10", "B200"])
def test_other_gpus_are_known_with_their_speed(model: Path, gpu: str) -> None:
    result = json.loads(run(hf_model_path=model, gpu=gpu, gpus=8, optimizer_state="bf16", json=True))
    assert gpu.upper() in result["gpu"]["name"] and any(layout["tokens_per_s"] for layout in result["layouts"])
