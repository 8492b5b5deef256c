"""Which layouts are worth a trial, which runs cannot be tuned, and why a trial failed."""

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint.formats.checkpoint_paths import Checkpoint
from common.errors import KitError
from common.estimate.gpus import Gpu, find_gpu
from common.model.shape.config import load_config
from common.platforms.cpu import CPU
from common.settings import to_flags
from common.training.planning.plan import Start
from common.training.settings import TrainSettings
from common.tune import tuning
from common.tune.candidates import candidates, check_tunable, with_layout, with_open_layout
from common.tune.options import Trials, add_trial_options, check_no_trials, trials_of
from common.tune.results import settings_lines, table
from common.tune.trial import Trial, reason_of, trial_settings
from tests.recipes import write_config as recipe_config
from tests.unit.estimate.ranks import write_config

SHAPE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 16384,
}  # fmt: skip


def settings(**more: Any) -> TrainSettings:
    same = {"save_checkpoint_path": "/run", "dataset_path": "/data", "epochs": 1.0, "train_mode": "pretrain"}
    return TrainSettings(**{**same, "gpus": 4, "seq_length": 1024, "global_batch_size": 32, "packing": False, **more})


def found(tmp_path: Path, gpu: Gpu, number: int = 1000, **more: Any) -> list[tuple[str, str, int]]:
    """(fits, recompute, layout) of each candidate."""
    given = candidates(settings(**more), load_config(write_config(tmp_path, **SHAPE)), gpu, number)
    layouts = [(one.settings.tp, one.settings.pp, one.settings.vpp, one.settings.micro_batch_size) for one in given]
    return [(one.fits, one.settings.recompute, hash(each)) for one, each in zip(given, layouts, strict=True)]


def test_a_layout_that_fits_is_not_tried_with_recomputation(tmp_path: Path) -> None:
    roomy = found(tmp_path, find_gpu("H200"))
    assert len(roomy) > 10 and {recompute for _, recompute, _ in roomy} == {"none"}
    narrow = found(tmp_path, find_gpu("H200", 20.0))
    assert {"none", "full"} <= {recompute for _, recompute, _ in narrow}
    fitting = [layout for fits, recompute, layout in narrow if (fits, recompute) == ("yes", "none")]
    assert len(set(fitting)) == len(fitting) and not {
        layout for _, recompute, layout in narrow if recompute != "none"
    } & set(fitting)


def test_the_fastest_by_the_estimate_come_first_and_no_more_than_asked(tmp_path: Path) -> None:
    assert found(tmp_path, find_gpu("H200"), 3) == found(tmp_path, find_gpu("H200"))[:3]


def test_the_runs_own_layout_need_not_divide_its_batch() -> None:
    """Four long rows on eight GPUs need CP, which is to be found."""
    given = Namespace(
        **{**asdict(settings()), "gpus": 8, "tp": 2, "pp": 2, "vpp": 2, "global_batch_size": 3, "micro_batch_size": 4}
    )
    with pytest.raises(KitError, match="GLOBAL_BATCH_SIZE=3 cannot be divided"):
        TrainSettings(**vars(given))
    own = TrainSettings(**vars(with_open_layout(given)))
    assert (own.tp, own.cp, own.sizes.dp, own.micro_batch_size, own.global_batch_size) == (2, 1, 1, 1, 3)
    odd = Namespace(**{**vars(given), "tp": 3})
    assert with_open_layout(odd) is odd


def layout(settings: TrainSettings) -> tuple[int | str, ...]:
    return settings.tp, settings.pp, settings.vpp, settings.cp, settings.micro_batch_size, settings.recompute


@pytest.mark.parametrize("given", [1, 2])
def test_context_parallelism_is_tried_for_long_rows_whatever_the_settings_have(tmp_path: Path, given: int) -> None:
    """CP=4 needs no recomputation, which CP=1 does; CP=2 with two rows is CP=1 with one, and more to exchange."""
    whole, qwen = settings(seq_length=16384, cp=given), load_config(write_config(tmp_path, **SHAPE))
    best = candidates(whole, qwen, find_gpu("H200", 24.0), 4)
    assert [layout(with_layout(whole, one)) for one in best] == [
        (1, 1, 1, 4, 1, "none"), (2, 1, 1, 2, 1, "none"), (1, 1, 1, 1, 2, "full"), (4, 1, 1, 1, 1, "none")
    ]  # fmt: skip
    trial = Trial(tokens_per_s=1000.0, memory_gib=20.0)
    for one, sizes in ((best[0], {"VPP=1", "CP=4", "RECOMPUTE=none"}), (best[2], {"VPP=1", "CP=1", "RECOMPUTE=full"})):
        assert sizes <= {*settings_lines(one, trial, find_gpu("H200"), 8)}
    header, first, _ = (line.split() for line in table([(one, trial) for one in (best[0], best[2])]))
    assert header[:5] == ["TP", "PP", "VPP", "CP", "micro-batch"] and first[:6] == ["1", "1", "1", "4", "1", "none"]
    header, first = (line.split() for line in table([(best[2], trial)]))
    assert header[:4] == ["TP", "PP", "VPP", "micro-batch"] and first[:5] == ["1", "1", "1", "2", "full"]


def test_stages_are_balanced_where_that_is_faster_and_the_trial_and_the_file_have_it(tmp_path: Path) -> None:
    """3B in 2 GPUs' memory as at PP=2 and one sample at a time."""
    wide, qwen = settings(gpus=2, seq_length=4096, global_batch_size=8), recipe_config(tmp_path, "3B")
    best = candidates(wide, qwen, find_gpu("H200"), 1000)
    (one,) = (each for each in best if layout(each.settings) == (1, 2, 1, 1, 1, "none"))
    assert one.settings.pipeline_layers == "19,17"
    assert "--pipeline-layers=19,17" in to_flags(trial_settings(with_layout(wide, one), tmp_path, tmp_path))
    trial, plain = Trial(tokens_per_s=1000.0, memory_gib=20.0), next(each for each in best if each.settings.pp == 1)
    assert "PIPELINE_LAYERS=19,17" in [*settings_lines(one, trial, find_gpu("H200"), 8)]
    rows = [line.split() for line in table([(one, trial), (plain, trial)])]
    assert rows[0][3] == "PIPELINE_LAYERS" and {row[3] for row in rows[1:]} == {"19,17", "even"}
    assert "PIPELINE_LAYERS" not in next(table([(plain, trial)]))
    even = candidates(wide, qwen, find_gpu("H200"), 1000, even=True)
    assert {each.settings.pipeline_layers for each in even} == {None} and len({each.settings.pp for each in even}) == 2


@pytest.mark.parametrize("format", ["torch", "torch_dist"])
def test_a_start_in_torch_format_keeps_even_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    write_config(tmp_path / "model", **SHAPE)
    checkpoint = Checkpoint(tmp_path / "model", tmp_path / "release", "release", format)  # type: ignore[arg-type]
    monkeypatch.setattr(tuning, "find_start", lambda settings: Start("weights", tmp_path / "model", checkpoint))
    asked: list[bool] = []

    def stop(*given: Any, even: bool) -> list[Any]:
        asked.append(even)
        raise KitError("enough")

    monkeypatch.setattr(tuning, "candidates", stop)
    with pytest.raises(KitError, match="enough"):
        tuning.tune(settings(load_checkpoint_path="/start"), CPU, tmp_path / "tuned.env", Trials())
    assert asked == [format == "torch"]


@pytest.mark.parametrize("given", [1, 2])
def test_short_rows_keep_the_context_parallelism_of_the_settings(tmp_path: Path, given: int) -> None:
    short = settings(seq_length=8192, cp=given)
    best = candidates(short, load_config(write_config(tmp_path, **SHAPE)), find_gpu("H200"), 1000)
    assert {one.settings.cp for one in best} == {given}


def test_where_nothing_fits_the_error_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(KitError, match=r"no layout fits: the best needs [\d.]+ GiB per GPU .* H200 has 2.0: use more"):
        found(tmp_path, find_gpu("H200", 2.0))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"nnodes": 2, "global_batch_size": 64}, "NNODES=2: .* set NNODES=1 and GLOBAL_BATCH_SIZE to .* share, 32"),
        ({"train_mode": "dpo"}, "TRAIN_MODE=dpo: .* tune TRAIN_MODE=finetune"),
        ({"train_or_convert_ckpt": "convert", "load_checkpoint_path": "/ckpt"}, "convert has no layout"),
    ],
)
def test_runs_that_cannot_be_tuned_are_refused_with_the_remedy(more: dict[str, Any], words: str) -> None:
    with pytest.raises(KitError, match=words):
        check_tunable(settings(**more))


def test_a_trial_neither_saves_nor_evaluates_nor_loads_what_it_does_not_need(tmp_path: Path) -> None:
    whole = settings(
        load_checkpoint_path="/start", export_hf="each", eval_interval=5, wandb_project="mine", keep_best=2
    )
    trial = trial_settings(whole, tmp_path / "model", tmp_path / "run")
    assert (trial.load_checkpoint_path, trial.hf_model_path) == (None, str(tmp_path / "model"))
    assert (trial.save_checkpoint_path, trial.export_hf, trial.eval_interval) == (str(tmp_path / "run"), "none", 0)
    assert trial.wandb_project is None and trial.save_interval > 10**6 and trial.lr == whole.lr
    adapters = settings(load_checkpoint_path="/start", tuner="lora", train_mode="finetune")
    assert trial_settings(adapters, tmp_path / "model", tmp_path / "run").load_checkpoint_path == "/start"


def test_the_reason_of_a_failed_trial_is_its_last_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\nerror: rank 0 is out of memory (2 GiB): use less\ntraceback\n\n")
    assert reason_of(log) == "error: rank 0 is out of memory (2 GiB): use less"
    log.write_text("a\nSegmentation fault\n")
    assert reason_of(log) == "Segmentation fault"


@pytest.mark.parametrize(
    ("given", "expected"),
    [([], Trials(5, 8, 10.0)), (["--trials=2", "--trial-iterations=4", "--trial-limit-min=1"], Trials(2, 4, 1))],
)
def test_how_much_is_tried_is_given_by_flags(given: list[str], expected: Trials) -> None:
    assert trials_of(parsed(given)) == expected


@pytest.mark.parametrize("given", ["--trials=0", "--trial-iterations=1", "--trial-limit-min=nan"])
def test_trials_that_measure_nothing_are_refused(given: str) -> None:
    with pytest.raises(KitError, match=rf"^{given}(\.0)?: it must be at least"):
        trials_of(parsed([given]))


def test_trials_without_a_file_to_tune_to_are_refused() -> None:
    check_no_trials(parsed([]))
    with pytest.raises(KitError, match="--trial-iterations is for --tune FILE, which is not given"):
        check_no_trials(parsed(["--trial-iterations", "4"]))


def parsed(words: list[str]) -> Namespace:
    parser = ArgumentParser()
    add_trial_options(parser)
    return parser.parse_args(words)
