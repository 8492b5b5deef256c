"""Which Megatron-Core is installed, which are supported, and where they are named."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.engine import versions
from common.engine.base import Engine
from common.errors import KitError
from tests.unit.engine.installed import install

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0.11.0", (0, 11)),
        ("0.14.0rc7+a4306f7", (0, 14)),
        ("0.16.1", (0, 16)),
        ("0.19.2", (0, 19)),
    ],
)
def test_a_supported_version_is_read(
    text: str, expected: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, text, monkeypatch)
    assert versions.installed_engine().version == expected


WORK = (
    "this kit works with 0.11.0 for torch 2.1 (MetaX's maca 2.27), 0.14.0 for torch 2.2 to 2.5 (NVIDIA's NGC 24.03),"
    " 0.16.1 for torch 2.6 or later on Python 3.10 or 3.11 (a CPU, MetaX's MACA 3.5) and 0.19.2 for torch 2.6 or"
    " later on Python 3.12 or later (a CPU, NGC 24.12 and later, MACA 3.8): pip install --no-deps"
    " megatron-core==VERSION, the one"
)


@pytest.mark.parametrize(
    "text",
    [
        "0.9.0",
        "0.10.0",
        "0.12.3",
        "0.13.1",
        "0.15.3",
        "0.17.0",
        "0.17rc1",
        "0.17.1",
        "0.18.0",
        "0.20.0",
        "1.0.0",
        "1.11.0",
        "1.16",
        "1",
        "x",
    ],
)
def test_any_other_version_is_refused_with_those_that_work_and_where(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, text, monkeypatch)
    with pytest.raises(KitError, match=f"^{re.escape(f'megatron-core {text} is installed, and {WORK}')}"):
        versions.installed_engine()


def test_a_missing_megatron_core_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(KitError, match=f"^megatron-core is not installed, and {re.escape(WORK)}"):
        versions.installed_engine()


def test_supported_releases_are_those_that_are_locked_built_and_tested() -> None:
    releases = {engine.release for engine in versions.ENGINES}
    images = (ROOT / "docker").glob("*.Dockerfile")
    locked = [*(ROOT / "requirements").glob("*.txt"), *images]
    assert releases == set(found(r"(?:megatron-core==|MEGATRON_CORE=)(\d+\.\d+\.\d+)", *locked))
    assert releases == set(found(r"(?m)^[\w.-]+ +3\.\d+ +2\.\d+\.\d+ +(\S+) ", ROOT / "tests" / "lanes.sh"))


def test_no_other_part_names_a_version() -> None:
    """What differs between versions is in `common/engine`; a comment may name the version that it refers to."""
    named = {
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "common").rglob("*.py"))
        if path.parent.name != "engine"
        for node in versions_in(ast.parse(path.read_text()))
    }
    assert not named


def versions_in(module: ast.Module) -> Iterator[ast.expr]:
    """The strings, docstrings aside, and the tuples that name a minor version of Megatron-Core."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(module)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(module):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in docstrings and re.search(r"\b0\.1\d\b", text):
                yield node
            case ast.Tuple(elts=[ast.Constant(value=0), ast.Constant(value=int(minor)), *_]) if 10 < minor < 30:
                yield node


def test_versions_are_found_in_code() -> None:
    found = versions_in(ast.parse('"""0.14"""\nif version() >= (0, 14) or text == f"{x} 0.16.1": pass'))
    assert [node.lineno for node in found] == [2, 2]


def test_dropping_a_version_is_deleting_its_file_and_its_name(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    oldest, *others = [engine.release for engine in versions.ENGINES]
    name = type(versions.ENGINES[0]).__name__
    (tmp_path / "common/engine" / f"v{'_'.join(oldest.split('.')[:2])}.py").unlink()
    selection = tmp_path / "common/engine/versions.py"
    selection.write_text("".join(line for line in selection.read_text().splitlines(True) if name not in line))
    program = "import common.train\nfrom common.engine.versions import ENGINES\nprint(*[e.release for e in ENGINES])"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == others, done.stderr


def test_reading_the_version_loads_no_heavy_library() -> None:
    program = "import sys; from common.engine import *; from common.engine.versions import installed_engine\n"
    program += "installed_engine(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "common.engine.versions" in done.stdout and not {"torch", "megatron"} & {*done.stdout.split()}


def found(pattern: str, *paths: Path) -> list[str]:
    """All that `pattern` finds in the files."""
    return [text for path in paths for text in re.findall(pattern, path.read_text())]


@pytest.mark.parametrize("engine", versions.ENGINES, ids=lambda engine: engine.name)
def test_gradients_are_divided_by_the_tokens_of_all_ranks_that_share_rows(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron-Core 0.11 sums them over the others alone."""
    from megatron.core import distributed, parallel_state

    done: list[Any] = []
    monkeypatch.setattr(parallel_state, "get_context_parallel_group", lambda: "CP")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: done.append((int(tensor), group)))
    monkeypatch.setattr(distributed, "finalize_model_grads", lambda *given, **more: done.append((*given, more)))
    engine.finalize_model_grads(["chunk"], torch.tensor(7), pg_collection=None)
    engine.finalize_model_grads(["chunk"], None)
    summed = [(7, "CP")] if engine.name == "0.11" else []
    assert done == [*summed, (["chunk"], torch.tensor(7), {"pg_collection": None}), (["chunk"], None, {})]
