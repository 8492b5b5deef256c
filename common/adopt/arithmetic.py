"""Arithmetic of a shell script, as in `$(( 3 * samples / 16 ))`, on constants and variables that are known."""

import operator
import re
from collections.abc import Callable

from tree_sitter import Node

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "<<": operator.lshift, ">>": operator.rshift,
    "<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
    "&": operator.and_, "|": operator.or_, "^": operator.xor,
    "&&": lambda left, right: int(bool(left and right)), "||": lambda left, right: int(bool(left or right)),
}  # fmt: skip
LARGEST_POWER = 64  # bash's integers have 64 bits


def evaluate(node: Node, expand: Callable[[Node], str]) -> int | None:
    """The value of an arithmetic expression; None unless all its operands are integers.

    expand: the text of an operand.
    """
    if node.type in ("arithmetic_expansion", "parenthesized_expression", "compound_statement"):
        inner = [child for child in node.children if child.is_named]
        return evaluate(inner[0], expand) if len(inner) == 1 else None
    parts = {name: node.child_by_field_name(name) for name in ("left", "right", "condition", "consequence")}
    if node.type == "binary_expression":
        left, right = (evaluate(each, expand) if (each := parts[side]) else None for side in ("left", "right"))
        symbol = node.child_by_field_name("operator")
        return None if left is None or right is None or symbol is None else _apply(symbol.type, left, right)
    if node.type == "ternary_expression":
        condition = evaluate(parts["condition"], expand) if parts["condition"] else None
        if condition is None:
            return None
        branch = parts["consequence"] if condition else node.child_by_field_name("alternative")
        return evaluate(branch, expand) if branch else None
    if node.type == "unary_expression":
        value = evaluate(node.children[-1], expand)
        symbol_text = node.children[0].type
        signs: dict[str, Callable[[int], int]] = {
            "-": lambda number: -number,
            "+": int,
            "!": lambda number: int(not number),
        }
        return None if value is None or symbol_text not in signs else signs[symbol_text](value)
    text = expand(node).strip()
    return int(text) if re.fullmatch(r"-?(0|[1-9][0-9]*)", text) else None


def _apply(symbol: str, left: int, right: int) -> int | None:
    if symbol in ("/", "%"):
        if not right:
            return None
        quotient = abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)  # towards 0, as bash
        return quotient if symbol == "/" else left - right * quotient
    if symbol == "**":
        return int(left**right) if 0 <= right <= LARGEST_POWER else None
    return int(OPERATORS[symbol](left, right)) if symbol in OPERATORS else None
