"""Names on disk: Megatron-LM's tracker, iterations and ranks."""

from pathlib import Path

import pytest

from common.checkpoint.formats.checkpoint_paths import (
    Checkpoint,
    find_checkpoint,
    format_of,
    iteration_dir,
    iteration_number,
    list_iterations,
    rank_dir_name,
    read_tracker,
    write_tracker,
)
from common.errors import KitError

TRACKER = "latest_checkpointed_iteration.txt"


def make(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(file)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def torch_format(path: Path) -> Path:
    return make(path, "mp_rank_00/model_optim_rng.pt")


def dist_format(path: Path) -> Path:
    return make(path, ".metadata", "metadata.json", "__0_0.distcp")


def test_names_are_megatrons(tmp_path: Path) -> None:
    assert iteration_dir(tmp_path, 100) == tmp_path / "iter_0000100"
    assert iteration_dir(tmp_path, 12345678) == tmp_path / "iter_12345678"
    assert iteration_dir(tmp_path, "release") == tmp_path / "release"
    assert [rank_dir_name(1, 0, 1), rank_dir_name(1, 2, 4)] == ["mp_rank_01", "mp_rank_01_002"]
    assert [iteration_number(name) for name in ("iter_0000100", "iter_12345678")] == [100, 12345678]
    others = ("release", "iter_100", "iter_0000100.tmp", "xiter_0000100", "iter_", "iter_00001x0")
    assert not any(iteration_number(name) for name in others)


@pytest.mark.parametrize("content", ["release", "release\n", "100", " 100\n", "0000100\n"])
def test_the_tracker_is_read(tmp_path: Path, content: str) -> None:
    (tmp_path / TRACKER).write_text(content)
    assert read_tracker(tmp_path) == ("release" if "release" in content else 100)


@pytest.mark.parametrize("content", [b"", b"latest", b"-5", b"1.5", b"100\n200", b"\xff\xfe"])
def test_an_empty_tracker_is_reported(tmp_path: Path, content: bytes) -> None:
    (tmp_path / TRACKER).write_bytes(content)
    with pytest.raises(KitError, match="it must hold a number or the word release; write one there"):
        read_tracker(tmp_path)


def test_the_tracker_is_replaced_in_one_step(tmp_path: Path) -> None:
    assert read_tracker(tmp_path) is None
    for iteration in (5, "release", 70):
        write_tracker(tmp_path, iteration)
        assert read_tracker(tmp_path) == iteration and names(tmp_path) == [TRACKER]
    assert (tmp_path / TRACKER).read_text() == "70\n"


def test_the_newest_checkpoint_is_what_the_tracker_names(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    torch_format(tmp_path / "iter_0000100")
    dist_format(tmp_path / "release")
    assert find_checkpoint(tmp_path) is None  # nothing marks them as complete
    write_tracker(tmp_path, 100)
    assert find_checkpoint(tmp_path) == Checkpoint(tmp_path, tmp_path / "iter_0000100", 100, "torch")
    write_tracker(tmp_path, "release")
    assert find_checkpoint(tmp_path) == Checkpoint(tmp_path, tmp_path / "release", "release", "torch_dist")


def test_one_iteration_can_be_named_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = torch_format(tmp_path / "iter_0000100")
    assert find_checkpoint(path) == Checkpoint(tmp_path, path, 100, "torch")
    monkeypatch.chdir(path)
    assert find_checkpoint(Path()) == Checkpoint(tmp_path, path, 100, "torch")
    release = dist_format(tmp_path / "release")
    assert find_checkpoint(release) == Checkpoint(tmp_path, release, "release", "torch_dist")
    assert find_checkpoint(torch_format(tmp_path / "other")) is None
    assert find_checkpoint(make(tmp_path / "iter_0000200", "x")) is None


def test_a_tracker_that_names_a_missing_iteration_is_reported(tmp_path: Path) -> None:
    write_tracker(tmp_path, 300)
    torch_format(tmp_path / "iter_0000100")
    dist_format(tmp_path / "release")
    message = (
        r"names iter_0000300, which does not exist: restore that folder, or write one of \['100', 'release'\] there"
    )
    with pytest.raises(KitError, match=message):
        find_checkpoint(tmp_path)
    make(tmp_path / "iter_0000300", "__0_0.distcp", "common.pt")
    with pytest.raises(KitError, match=r"iter_0000300 holds neither .* nor \.metadata: the checkpoint is incomplete"):
        find_checkpoint(tmp_path)


def test_the_format_is_recognized_by_the_files(tmp_path: Path) -> None:
    assert format_of(dist_format(tmp_path / "a")) == "torch_dist"
    assert format_of(make(tmp_path / "b", "mp_rank_01_003/model_optim_rng.pt")) == "torch"
    for number, files in enumerate([[".metadata"], ["metadata.json"], ["mp_rank_00/distrib_optim.pt"], ["x"]]):
        assert format_of(make(tmp_path / f"c{number}", *files)) is None
    assert format_of(tmp_path / "nowhere") is None


def test_complete_iterations_are_listed_by_number(tmp_path: Path) -> None:
    for name in ("iter_0000200", "iter_0000020", "iter_10000000"):
        torch_format(tmp_path / name)
    dist_format(tmp_path / "release")
    make(tmp_path / "iter_0000300", "common.pt")
    make(tmp_path, "iter_0000400")
    assert list_iterations(tmp_path) == [20, 200, 10000000]
    assert list_iterations(tmp_path / "nowhere") == []
