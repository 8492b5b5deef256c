"""PIPELINE_LAYERS of the shortest step: what the output layer is worth, the splits, and when even stages stay."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from common.engine import versions
from common.estimate import speed
from common.estimate.balance import Ends, Split, balanced_layers, ends_in_layers, faster_split
from common.estimate.gpus import Gpu, find_gpu
from common.estimate.memory import work_of
from common.estimate.schedule import moments
from common.model.shape.config import QwenConfig
from common.training.settings import TrainSettings
from tests.recipes import write_config

H200 = find_gpu("H200")


def settings(**changes: Any) -> TrainSettings:
    same = {"save_checkpoint_path": "-", "dataset_path": "-", "train_iters": 1, "seq_length": 4096, "pp": 2}
    return TrainSettings(**{**same, "gpus": 2, "micro_batch_size": 1, "global_batch_size": 32, **changes})


def ends_of(given: TrainSettings, qwen: QwenConfig) -> Ends:
    return ends_in_layers(given, work_of(given, H200.platform, qwen), H200)


def split_of(given: TrainSettings, qwen: QwenConfig, gpu: Gpu = H200) -> Split | None:
    return faster_split(given, work_of(given, gpu.platform, qwen), gpu)


@pytest.fixture
def qwen(tmp_path: Path) -> QwenConfig:
    return write_config(tmp_path, "3B")


@pytest.mark.parametrize("fused", ["true", "auto"])
@pytest.mark.parametrize("seq_length", [1024, 16384])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_output_layer_counts_in_layers_with_their_attention(
    qwen: QwenConfig, monkeypatch: pytest.MonkeyPatch, fused: str, seq_length: int, recompute: str
) -> None:
    """In operations alone: h v of h (qkv + q) + 3 h f + s q, half of two attention products; recomputed 4/3 of it."""
    counted = dict.fromkeys(speed.SECONDS, 0.0) | dict.fromkeys(("products", "attention", "FlashAttention 4"), 1.0)
    monkeypatch.setattr(speed, "SECONDS", counted)
    layer = 2048 * (2560 + 2048) + 3 * 2048 * 11008 + seq_length * 2048
    found = ends_of(settings(seq_length=seq_length, fused_products=fused, recompute=recompute), qwen)
    times = 4 / 3 if recompute == "full" else 1
    assert (found.first, found.last) == (pytest.approx(0), pytest.approx(2048 * 151936 / (times * layer)))


def test_time_between_gpus_makes_a_layer_longer(qwen: QwenConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    at_tp2 = settings(tp=2, gpus=4)
    fast = ends_of(at_tp2, qwen)
    monkeypatch.setattr(speed, "LINK_BYTES_PER_SECOND", 1e9)
    slow = ends_of(at_tp2, qwen)
    assert slow.last < fast.last / 2 and slow.first < fast.first / 2


@pytest.mark.parametrize(
    ("num_layers", "pp", "vpp", "last", "expected"),
    [
        (36, 2, 1, 3.5, (20, 16)),
        (36, 2, 2, 3.5, (10, 10, 10, 6)),
        (28, 4, 1, 2.1, (7, 8, 8, 5)),
        (28, 2, 2, 2.1, (7, 8, 8, 5)),
        (48, 4, 3, 1.6, (4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 5, 3)),
        (24, 2, 2, 9.0, (8, 7, 8, 1)),
        (4, 4, 1, 3.0, (1, 1, 1, 1)),
        (24, 4, 1, 0.4, (6, 6, 6, 6)),
    ],
)
def test_the_last_stage_has_fewer_layers(
    num_layers: int, pp: int, vpp: int, last: float, expected: tuple[int, ...]
) -> None:
    assert balanced_layers(num_layers, pp, vpp, Ends(0.1, last)) == expected


def stages(layers: Sequence[int], pp: int, ends: Ends) -> list[float]:
    found = [float(sum(layers[stage::pp])) for stage in range(pp)]
    return [found[0] + ends.first, *found[1:-1], found[-1] + ends.last]


@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("ends", [Ends(0.1, 0.7), Ends(0.3, 2.4), Ends(1.2, 4.1)])
def test_no_split_has_a_faster_slowest_stage(pp: int, ends: Ends) -> None:
    total = 12
    every = (each for each in itertools.product(range(1, total), repeat=pp) if sum(each) == total)
    best = min(max(stages(each, pp, ends)) for each in every)
    assert max(stages(balanced_layers(total, pp, 1, ends), pp, ends)) == pytest.approx(best)


def step(layers: Sequence[int], pp: int, vpp: int, last: float, number: int) -> float:
    """A step by the order of its passes, each as soon as its input is there; a backward pass takes two forward's."""
    passes = [list(moments(pp, vpp, rank, number)) for rank in range(pp)]
    ends, clock, done = len(layers) - 1, [0.0] * pp, {}
    at, counts = [0] * pp, [dict[tuple[bool, int], int]() for _ in range(pp)]
    while any(place < len(each) for place, each in zip(at, passes, strict=True)):
        for rank in range(pp):
            while at[rank] < len(passes[rank]):
                forward, chunk, _ = passes[rank][at[rank]]
                place, batch = chunk * pp + rank, counts[rank].get((forward, chunk), 0)
                before = (True, place - 1) if forward else (True, place) if place == ends else (False, place + 1)
                if before[1] >= 0 and (*before, batch) not in done:
                    break
                took = (layers[place] + (last if place == ends else 0)) * (1 if forward else 2)
                clock[rank] = max(clock[rank], done.get((*before, batch), 0.0)) + took
                done[forward, place, batch] = clock[rank]
                counts[rank][forward, chunk] = batch + 1
                at[rank] += 1
    return max(clock)


@pytest.mark.parametrize(
    ("num_layers", "pp", "vpp", "last", "in_layers"),
    [
        (36, 2, 2, 4.0, (10, 8, 10, 8)),
        (28, 4, 1, 2.1, None),
        (48, 4, 2, 2.7, (6, 6, 6, 5, 6, 6, 7, 6)),
        (36, 4, 3, 4.2, (4, 4, 4, 2, 3, 3, 3, 2, 3, 3, 3, 2)),
    ],
)
def test_a_step_by_its_passes_is_faster(
    num_layers: int, pp: int, vpp: int, last: float, in_layers: tuple[int, ...] | None
) -> None:
    """Than with even stages, and than with chunks of a stage that are even without the output layer."""
    split = balanced_layers(num_layers, pp, vpp, Ends(0.0, last))
    even = (num_layers // (pp * vpp),) * (pp * vpp)
    for number in (4 * pp, 16 * pp):
        found = step(split, pp, vpp, last, number)
        assert found < 0.97 * step(even, pp, vpp, last, number)
        assert in_layers is None or found < step(in_layers, pp, vpp, last, number)


def absent() -> str:
    raise versions.metadata.PackageNotFoundError("megatron-core")


@pytest.mark.parametrize("version", [lambda: "0.11.0", absent], ids=["0.11", "none"])
def test_a_version_without_uneven_chunks_gets_what_every_version_has(
    qwen: QwenConfig, monkeypatch: pytest.MonkeyPatch, version: Callable[[], str]
) -> None:
    one, two = (split_of(settings(vpp=vpp, micro_batch_size=4), qwen) for vpp in (1, 2))
    assert one and one.layers == "20,16" and two and two.layers == "10,10,10,6"
    ends = Ends(0.2, 1.6)
    assert balanced_layers(48, 4, 1, ends) == (12, 12, 13, 11)
    monkeypatch.setattr(versions, "installed_version", version)
    assert split_of(settings(vpp=1, micro_batch_size=4), qwen) == one
    assert split_of(settings(vpp=2, micro_batch_size=4), qwen) is None
    assert balanced_layers(48, 4, 1, ends) == (12, 13, 13, 10)


def test_even_stages_stay_where_they_are_as_fast(tmp_path: Path, qwen: QwenConfig) -> None:
    assert split_of(settings(pp=1, gpus=1), qwen) is None
    large = write_config(tmp_path / "72B", "72B")
    assert balanced_layers(80, 2, 1, ends_of(settings(), large)) == (41, 39)
    assert split_of(settings(), large) is None, "the gain of a layer less is below 1%"


@pytest.mark.parametrize(("name", "layers"), [("H200", "19,17"), ("C500", "20,16")])
def test_the_gain_is_that_of_the_estimates_steps(qwen: QwenConfig, name: str, layers: str) -> None:
    """A GPU without rates has those by which its layouts are compared."""
    gpu, rated = find_gpu(name), find_gpu("A100" if name == "C500" else name)
    found = split_of(settings(), qwen, gpu)
    assert found and found.layers == layers and 0.03 < found.gain < 0.12
    runs = [settings(pipeline_layers=each) for each in (None, layers)]
    times = [speed.speed(run, work_of(run, gpu.platform, qwen), rated).step_seconds for run in runs]
    assert found.gain == pytest.approx(times[0] / times[1] - 1)
