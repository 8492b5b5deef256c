"""The shape of the source: imports point one way, heavy libraries stay out of the light commands, files stay small.

Reads the source as text, and fresh processes show what an import loads.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).parents[2]
COMMON = ROOT / "common"

# Lowest first. Parts on one layer do not know each other.
LAYERS = [
    {"errors", "start", "files"},
    {"log", "ports"},
    {"hub"},
    {"settings", "parallel", "platforms", "engine", "json_file", "folders"},
    {"locks", "progress"},
    {"model", "data"},
    {"checkpoint"},
    {"inference"},
    {"training", "demo"},
    {"estimate", "report"},
    {"tune"},
    {"preprocess", "convert", "logits", "train", "doctor", "watch", "chat", "evaluate", "adopt"},
]
# The rooms of a part, lowest first; a file beside them is a room of its own.
ROOMS = {
    "data": ["sources", "tokenizer", "dataset", "templates", "encoders", "preprocessing"],
    "model": ["shape", "probe", "layers", "kernels", "build"],
    "checkpoint": ["io", "untrusted", "formats", "verification", "conversion"],
    "training": ["settings", "planning", "launching", "state", "checkpointing", "tracking", "loop"],
}
LAYER_OF = {part: layer for layer, parts in enumerate(LAYERS) for part in parts}

# What the light commands must never load; the tokenizer's chat template is rendered by transformers, when it is needed.
HEAVY = ("megatron", "transformers")
HEAVY_ALLOWED = {("common.data.templates.chat_template", "transformers")}
LIGHT_COMMANDS = ("common.preprocess", "common.convert")

OPTIONAL = ("transformer_engine", "apex", "flash_attn")
# Need triton.
KERNELS = tuple(
    f"common.model.kernels.{name}" for name in ("loss_kernels", "norm_kernels", "qkv_rope", "quack_loss", "swiglu")
)
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60


def module_name(path: Path) -> str:
    """`common/data/encoders/sft.py` -> `common.data.encoders.sft`, `common/data/__init__.py` -> `common.data`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(COMMON.rglob("*.py"))}
PARTS = {name.split(".")[1] for name in MODULES if name != "common"}
TEXT_FILES = [
    path
    for pattern in ("*.py", "*.sh", "*.bats", "*.bash")
    for path in sorted(ROOT.rglob(pattern))
    if not any(folder.startswith(".") for folder in path.relative_to(ROOT).parts[:-1])
]


@lru_cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@lru_cache
def imports(module: str) -> frozenset[str]:
    """Everything that `module` imports, inside functions too; the kit's by module, others by their full name."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{MODULES[module]}:{node.lineno}: relative import; write `from common.x import y`"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return frozenset(found)


def own_imports(module: str) -> set[str]:
    return {name for name in imports(module) if name.split(".")[0] == "common"}


def reachable(module: str) -> set[str]:
    """`module` and all of the kit's modules that it may ever import, parent packages included."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [*own_imports(name), *([name.rpartition(".")[0]] if "." in name else [])]
    return seen


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """(where, function, whether it is public) for every function of `common`, nested ones included."""

    def walk(node: ast.AST, where: str, public: bool) -> Iterator[tuple[str, ast.FunctionDef, bool]]:
        for child in ast.iter_child_nodes(node):
            name = getattr(child, "name", "")
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                shown = public and not name.startswith("_")
                yield f"{where}:{child.lineno} {name}", child, shown
                yield from walk(child, where, False)
            else:
                yield from walk(child, where, public and not (isinstance(child, ast.ClassDef) and name.startswith("_")))

    for module, path in MODULES.items():
        yield from walk(tree(module), str(path.relative_to(ROOT)), True)


def run_python(program: str, *arguments: str) -> str:
    """The stdout of `program`, in a fresh process without a GPU or a platform."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "KIT_PLATFORM": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **hidden}, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(module: str) -> list[str]:
    """The modules that importing `module` loads, in a fresh process."""
    found: list[str] = json.loads(run_python(f"import {module}, json, sys; print(json.dumps(sorted(sys.modules)))"))
    return found


def test_every_part_has_a_layer_and_is_in_the_map() -> None:
    assert set(LAYER_OF) >= PARTS
    words = (common.__doc__ or "").replace(",", " ").split()
    assert not {part for part in PARTS if part not in words}, "common/__init__.py does not draw every part"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    if module == "common":
        assert imports(module) == {"sys", "common.start"}, "whatever is imported of the kit imports this first"
        return
    part = module.split(".")[1]
    others = {name.split(".")[1] for name in own_imports(module)} - {part}
    upward = {other for other in others if LAYER_OF[other] >= LAYER_OF[part]}
    assert not upward, f"{module} must not import common.{', common.'.join(sorted(upward))}"


@pytest.mark.parametrize("part", sorted(ROOMS))
def test_imports_between_rooms_point_down(part: str) -> None:
    place = {room: number for number, room in enumerate(ROOMS[part])}
    inside = {name: name.split(".")[2] for name in MODULES if name.startswith(f"common.{part}.")}
    assert set(inside.values()) == set(place), f"ROOMS[{part!r}] does not name every room"
    upward = {
        (name, other)
        for name, room in inside.items()
        for other in own_imports(name) & set(inside)
        if place[inside[other]] > place[room]
    }
    assert not upward, f"these import what stands above them: {sorted(upward)}"


def test_nothing_but_the_demo_imports_the_demo() -> None:
    users = {module for module in MODULES if any(name.startswith("common.demo") for name in own_imports(module))}
    assert not {user for user in users if not user.startswith("common.demo")}


@pytest.mark.parametrize("part", sorted(PARTS))
def test_the_files_of_a_part_import_each_other_in_one_direction(part: str) -> None:
    inside = [name for name in MODULES if name.split(".")[1:2] == [part]]
    waiting = {name: own_imports(name) & set(inside) for name in inside}
    while free := [name for name, needed in waiting.items() if not needed & set(waiting)]:
        for name in free:
            del waiting[name]
    assert not waiting, f"these import each other in a circle: {sorted(waiting)}"


@pytest.mark.parametrize("command", LIGHT_COMMANDS)
def test_no_line_reachable_from_a_light_command_imports_a_heavy_library(command: str) -> None:
    found = {(module, name.split(".")[0]) for module in reachable(command) for name in imports(module)}
    assert not {pair for pair in found if pair[1] in HEAVY} - HEAVY_ALLOWED


@pytest.mark.parametrize("command", LIGHT_COMMANDS)
def test_importing_a_light_command_loads_no_heavy_library(command: str) -> None:
    loaded = loaded_by(command)
    assert command in loaded
    heavy = {name for name in loaded if name.split(".")[0] in HEAVY}
    assert not heavy or heavy <= set(loaded_by("torch.distributed.checkpoint")), "before torch 2.4 that imports some"


def test_rendering_a_chat_template_loads_no_model_class(tmp_path: Path) -> None:
    program = """
import json, pathlib, sys
from tests.tiny import tiny_qwen
from common.data.templates.chat_template import ChatTemplate
from common.data.tokenizer.text_tokenizer import load_tokenizer
folder = tiny_qwen(pathlib.Path(sys.argv[1]))
assert ChatTemplate(load_tokenizer(folder)).render([{"role": "user", "content": "x"}])
print(json.dumps(sorted(sys.modules)))
"""
    loaded = json.loads(run_python(program, str(tmp_path)))
    assert "transformers" in loaded
    # models/auto's modeling file is a table of names; the base class of every model is in modeling_utils.
    models = [name for name in loaded if name.startswith("transformers.models.") and ".modeling_" in name]
    assert not {*models} - {"transformers.models.auto.modeling_auto"}
    assert not [name for name in loaded if name.startswith("megatron") or name == "transformers.modeling_utils"]


def test_every_module_imports_without_optional_libraries_and_without_a_gpu() -> None:
    program = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({OPTIONAL}))  # None: neither imported nor found
from common.engine.patches import add_numpy_dtypes
add_numpy_dtypes()  # as before every import of Megatron-Core
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if name not in {KERNELS} or error.name != "triton":  # imported where a GPU is
            raise
assert sys.modules["torch"].cuda.is_initialized() is False
print(*(name for name in {OPTIONAL} if sys.modules[name]))
"""
    assert run_python(program, *MODULES).strip() == ""


@pytest.mark.parametrize("path", TEXT_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{path}: {lines} lines; split it"


def test_functions_are_short() -> None:
    lengths = {where: (node.end_lineno or 0) - node.lineno + 1 for where, node, _ in functions()}
    assert len(lengths) > 100
    assert not {where: length for where, length in lengths.items() if length > MAX_FUNCTION_LINES}


def test_every_function_has_a_return_type_and_every_public_one_a_docstring() -> None:
    kernel = "triton.jit"  # a language of its own, in which arguments have no types
    named = [(where, node) for where, node, _ in functions() if kernel not in map(ast.unparse, node.decorator_list)]
    assert not [where for where, node in named if node.returns is None]
    assert not [where for where, node, public in functions() if public and not ast.get_docstring(node)]
