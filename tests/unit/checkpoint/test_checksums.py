"""checksums.json: it holds the checksums of the files, and later changes are found."""

import json
from pathlib import Path

import pytest
import torch

from common.checkpoint.formats.torch_dist_reader import TorchDistReader
from common.checkpoint.formats.torch_dist_writer import TensorShard, write_torch_dist
from common.checkpoint.io.checksums import CHECKSUMS, check_all_files
from common.checkpoint.io.chunks import Chunk
from common.checkpoint.io.lazy_tensor import LazyTensor
from common.errors import KitError

LARGE = torch.arange(5_000_000, dtype=torch.float32).view(1000, 5000)  # over two blocks of the writer


def block(key: str, value: torch.Tensor) -> TensorShard:
    shape = tuple(value.shape)
    return TensorShard(key, shape, (0,) * len(shape), LazyTensor(shape, value.dtype, lambda: [[value]]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_torch_dist(
        tmp_path, [block("small", torch.ones(3)), block("large", LARGE)], {"iteration": 1}, lambda size: None
    )
    return tmp_path


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)


def read_large(folder: Path) -> torch.Tensor:
    found, reader = torch.zeros_like(LARGE), TorchDistReader(folder)
    for at, values, checksum in reader.blocks("large", Chunk((0, 0), (1000, 5000))):
        assert checksum
        checksum.update(values)
        found[at] = values
    return found


def test_what_was_written_is_found_as_it_was(folder: Path) -> None:
    assert check_all_files(folder) == 4
    assert torch.equal(read_large(folder), LARGE)


@pytest.mark.parametrize("place", [-20_000, 3_000_000, 19_000_000])
def test_a_flipped_bit_of_a_tensor_is_found_by_both(folder: Path, place: int) -> None:
    flip(folder / "__0_0.distcp", place)
    with pytest.raises(KitError, match=r"__0_0.distcp is damaged: its CRC-32 is \w{8}, expected \w{8}"):
        check_all_files(folder)
    with pytest.raises(KitError, match="__0_0.distcp is damaged: the CRC-32 of a chunk does not match"):
        read_large(folder)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json"])
def test_a_small_file_that_was_changed_is_found_before_it_is_read(folder: Path, name: str) -> None:
    flip(folder / name, 7)
    with pytest.raises(KitError, match=f"{name} is damaged: its CRC-32"):
        TorchDistReader(folder)


def test_a_file_that_was_cut_or_is_missing_is_named(folder: Path) -> None:
    data = folder / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    with pytest.raises(KitError, match=f"has {len(content) - 1} bytes, expected {len(content)}"):
        read_large(folder)
    data.unlink()
    with pytest.raises(KitError, match="__0_0.distcp is missing"):
        check_all_files(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is not a JSON object"),
        ("{", "is not valid JSON"),
        ('{"common.pt": 3}', "is damaged .*invalid entry for 'common.pt': 3"),
        ('{"common.pt": {"bytes": "x", "crc32": 0}}', "is damaged"),
        ('{"common.pt": {"bytes": true, "crc32": 0}}', "is damaged"),
        ('{"../common.pt": {"bytes": 1, "crc32": 0}}', "names .*, which is not in its folder"),
    ],
)
def test_damaged_checksums_are_named(folder: Path, content: str, message: str) -> None:
    (folder / CHECKSUMS).write_text(content)
    with pytest.raises(KitError, match=rf"checksums\.json {message}"):
        TorchDistReader(folder)


def test_an_older_checkpoint_without_them_is_read(folder: Path) -> None:
    checksums = json.loads((folder / CHECKSUMS).read_text())
    assert set(checksums) == {"__0_0.distcp", "common.pt", "metadata.json", ".metadata"}
    (folder / CHECKSUMS).unlink()
    assert check_all_files(folder) == 0 and torch.equal(read_large(folder), LARGE)
