"""A few hundred mutants of each kind of foreign file, read as the commands read it.

In a separate process: only KitError is raised, within time and memory bounds, and no code of the file runs.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint.verification.inspection import inspect_folder
from tests.fuzz import configs, pickles
from tests.fuzz.bounds import ROOT, in_a_child
from tests.fuzz.surfaces import common
from tests.unit.checkpoint.opcodes import archive, entry, named, word

COUNTS = {"rank_file": 60, "metadata": 200, "common": 60, "distcp": 30, "config": 400, "tokenizer_config": 300}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return in_a_child(COUNTS)


@pytest.mark.parametrize("surface", COUNTS)
def test_nothing_but_a_message_comes_of_a_damaged_or_hostile_file(surface: str, results: dict[str, Any]) -> None:
    assert results[surface]["escaped"] == []
    assert results[surface]["read"] > 0 and results[surface]["refused"] > COUNTS[surface] // 4


WORSE = """
import sys
from tests.fuzz.bounds import run
def take(data):
    if data == b"runs": import os; os.system("true")
    if data == b"grows": bytearray(2 << 30)
    if data == b"hangs":
        while True: pass
    if data == b"breaks": {}["x"]
import json
print(json.dumps(run(iter([b"sound", b"runs", b"grows", b"hangs", b"breaks"]), take)))
"""


def test_what_would_be_wrong_is_found() -> None:
    done = subprocess.run([sys.executable, "-c", WORSE], capture_output=True, text=True, check=True, cwd=ROOT)
    results = json.loads(done.stdout)
    assert results["read"] == 1 and results["refused"] == 0
    escaped = {bytes.fromhex(data): why for data, why in results["escaped"]}
    wrong = {b"runs": "os.system", b"grows": "MemoryError", b"hangs": "SlowError", b"breaks": "KeyError"}
    for data, why in wrong.items():
        assert why in escaped[data]


def test_the_same_seed_gives_the_same_cases() -> None:
    source = archive(entry(word("a"), named("torch", "float32")))
    for cases in (pickles.archive_cases, pickles.byte_cases):
        assert list(cases(3, 50, source)) == list(cases(3, 50, source)) != list(cases(4, 50, source))
    value = {"a": 1, "b": {"c": 2.5}}
    assert list(configs.cases(3, 50, value)) == list(configs.cases(3, 50, value)) != list(configs.cases(4, 50, value))


@pytest.mark.parametrize("value", [b")" + b"\x85" * 50_000, b"\x8b\x88\x13\0\0" + b"\x7f" * 5000], ids=["deep", "long"])
def test_an_argument_of_any_depth_or_length_is_described_by_its_kind(value: bytes, tmp_path: Path) -> None:
    common(tmp_path, 0, 0)
    arguments = named("argparse", "Namespace") + b")\x81" + entry(word("num_layers"), value) + b"b"
    (tmp_path / "megatron/release/common.pt").write_bytes(archive(entry(word("args"), arguments)))
    assert inspect_folder(tmp_path / "megatron")["written by"] in (
        "Megatron-LM or the like (num_layers tuple)", "Megatron-LM or the like (num_layers int)",
    )  # fmt: skip
