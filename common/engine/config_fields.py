"""The fields of Megatron-Core's config dataclasses, parsed from the installed source without importing it."""

import ast
from dataclasses import dataclass, field
from functools import cache

from common.engine.installation import check_origin

# The files of a section's dataclass and its base classes, relative to megatron/core.
SECTIONS = {
    "transformer": ("model_parallel_config.py", "transformer/transformer_config.py"),
    "ddp": ("distributed/distributed_data_parallel_config.py",),
    "optimizer": ("optimizer/optimizer_config.py",),
}
CLASSES = {"ModelParallelConfig", "TransformerConfig", "DistributedDataParallelConfig", "OptimizerConfig"}
SCALARS = {"bool": bool, "int": int, "float": float, "str": str}
LISTS = ("list", "List", "tuple", "Tuple", "Sequence")


@dataclass
class FieldType:
    """The values that a field accepts: scalars, the strings of Literals, lists, None."""

    scalars: list[type] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    items: list[type] = field(default_factory=list)
    optional: bool = False

    @property
    def readable(self) -> bool:
        """Whether the command line can set it; functions, dtypes and enums it cannot."""
        return bool(self.scalars or self.choices or self.items)

    def __str__(self) -> str:
        kinds = [*(kind.__name__ for kind in self.scalars), *self.choices]
        kinds += [f"one or more {kind.__name__}" for kind in self.items]
        return ", ".join([*kinds, *(["none"] if self.optional else [])])


@cache
def fields_of(section: str) -> dict[str, FieldType]:
    """The fields of a section's dataclass by name; raises KitError if megatron-core is not usable."""
    folder = check_origin().parent
    found: dict[str, FieldType] = {}
    for name in SECTIONS[section]:
        tree = ast.parse((folder / name).read_text(encoding="utf-8"))
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name in CLASSES):
            found |= {
                statement.target.id: _read(statement.annotation)
                for statement in node.body
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
            }
    return found


def _read(annotation: ast.expr) -> FieldType:
    kind = FieldType()
    _collect(annotation, kind)
    return kind


def _collect(node: ast.expr, kind: FieldType) -> None:
    """Adds the types in an annotation to `kind`; ignores those that the command line cannot set."""
    if isinstance(node, ast.Constant) and node.value is None:
        kind.optional = True
    elif isinstance(node, ast.Name) and node.id in SCALARS:
        kind.scalars.append(SCALARS[node.id])
    elif isinstance(node, ast.BinOp):
        _collect(node.left, kind)
        _collect(node.right, kind)
    elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id == "Literal":
            kind.choices += [str(each.value) for each in inner if isinstance(each, ast.Constant)]
        elif node.value.id in LISTS:
            kind.items += [SCALARS[each.id] for each in inner[:1] if isinstance(each, ast.Name) and each.id in SCALARS]
        elif node.value.id in ("Optional", "Union"):
            kind.optional = kind.optional or node.value.id == "Optional"
            for each in inner:
                _collect(each, kind)
