"""What is replaced in other packages at run time."""

import ast
import importlib
import inspect
import sys
from pathlib import Path

import numpy
import pytest

from common.engine import patches
from common.engine.patches import NEWEST, PATCHES, Patch
from common.engine.versions import ENGINES, version

COMMON = Path(patches.__file__).parents[1]


def test_numpy_without_dtypes_has_the_one_class_that_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy.dtypes", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    patches.add_numpy_dtypes()
    module = sys.modules.pop("numpy.dtypes")
    assert module.UInt32DType is type(numpy.dtype("uint32"))


def test_old_torch_reads_what_later_ones_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed._shard.sharded_tensor.metadata import MEM_FORMAT_ENCODING
    from torch.distributed.checkpoint import metadata

    monkeypatch.delattr(metadata, "_MEM_FORMAT_ENCODING", raising=False)
    patches.add_metadata_alias()
    assert metadata._MEM_FORMAT_ENCODING is MEM_FORMAT_ENCODING


def reads(source: str, name: str) -> bool:
    """Whether `source` reads `name`, by itself or as an attribute; its definition and assignments do not count."""
    return any(
        isinstance(node, ast.Name | ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and (node.id if isinstance(node, ast.Name) else node.attr) == name
        for node in ast.walk(ast.parse(source))
    )


def check(patch: Patch) -> None:
    """Fails where the installed Megatron-Core has no use for `patch` any more."""
    patches.add_numpy_dtypes()  # as before every import of megatron
    module = importlib.import_module(patch.module)
    *owner, name = patch.name.split(".")
    modules = {module.__name__}
    if owner:  # a base class may be what calls the method
        bases = {base.__module__ for base in getattr(module, owner[0]).__mro__}
        modules |= {base for base in bases if base.startswith("megatron.")}
    sources = [inspect.getsource(sys.modules[each]) for each in sorted(modules)]
    assert any(reads(source, name) for source in sources), f"{patch.module} does not read {name} any more"
    if patch.parameters is not None:
        found = module
        for part in patch.name.split("."):
            found = getattr(found, part)
        # A patch that another test of this process applied is not Megatron-Core's code.
        if found.__module__ == patch.module or patch.name == "bias_swiglu_impl":
            assert tuple(inspect.signature(found).parameters)[: len(patch.parameters)] == patch.parameters


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_the_installed_version_has_what_a_patch_replaces(patch: Patch) -> None:
    if patch.first <= version() <= patch.until:
        check(patch)


def test_a_patch_of_removed_code_is_found() -> None:
    with pytest.raises(AssertionError, match="does not read _gone"):
        check(Patch("megatron.core.transformer.mlp", "_gone", None, "for this test"))
    with pytest.raises(AssertionError):
        check(Patch("megatron.core.transformer.mlp", "bias_swiglu_impl", ("bias", "input"), "for this test"))


def test_patches_are_read_again_for_a_newer_version() -> None:
    assert ENGINES[-1].version == NEWEST


def imported_modules_assigned_to(path: Path) -> set[str]:
    """ "module.attribute" of each assignment in `path` to an attribute of something that it imports by `from`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("megatron", "transformer_engine")
        for alias in node.names
    }
    return {
        f"{imported[target.value.id]}.{target.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id in imported
    }


def test_what_is_replaced_is_in_the_table_and_nowhere_else() -> None:
    listed = {f"{patch.module}.{patch.name}" for patch in PATCHES}
    assigned = {path: imported_modules_assigned_to(path) for path in sorted(COMMON.rglob("*.py"))}
    here = assigned.pop(Path(patches.__file__))
    assert here and here <= listed
    assert not {path: names for path, names in assigned.items() if names}
