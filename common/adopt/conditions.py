"""Whether a condition of the script holds: `[ $TP -gt 1 ]`, `[[ -z $X || $Y == a ]]`; None where it is not known."""

import fnmatch
import re
from collections.abc import Callable

from tree_sitter import Node

from common.adopt.variables import MARK, Variables
from common.adopt.words import calculate, expand_text, text_of

NUMBERS: dict[str, Callable[[int, int], bool]] = {
    "-eq": lambda left, right: left == right, "-ne": lambda left, right: left != right,
    "-lt": lambda left, right: left < right, "-le": lambda left, right: left <= right,
    "-gt": lambda left, right: left > right, "-ge": lambda left, right: left >= right,
}  # fmt: skip
TEXTS = ("=", "==", "!=", "<", ">", "=~")
LINKS = {"&&": "and", "-a": "and", "||": "or", "-o": "or"}
# A token of a test: an operator or parenthesis as text, or an operand with its node.
Token = str | Node


def holds(node: Node, variables: Variables) -> bool | None:
    """Whether `node`, the condition of an `if` or the left side of `&&`, holds."""
    children = [child for child in node.children if child.is_named]
    if node.type == "test_command":
        return Test(_tokens(node), variables).value()
    if node.type == "compound_statement" and text_of(node).startswith("(("):
        number = calculate(node, variables)
        return None if number is None else bool(number)
    if node.type == "negated_command":
        return _not(holds(children[0], variables))
    if node.type == "list" and len(children) == 2:
        left, right = (holds(child, variables) for child in children)
        return _both(left, right) if node.children[1].type == "&&" else _either(left, right)
    if node.type == "command":
        return {"true": True, ":": True, "false": False}.get(
            " ".join(expand_text(each, variables) for each in children)
        )
    return None


def _not(value: bool | None) -> bool | None:
    return None if value is None else not value


def _both(left: bool | None, right: bool | None) -> bool | None:
    return False if left is False or right is False else None if left is None or right is None else True


def _either(left: bool | None, right: bool | None) -> bool | None:
    return _not(_both(_not(left), _not(right)))


def _tokens(node: Node) -> list[Token]:
    """The words of `[ ... ]` in order; the grammar's own nesting gives -a and -gt the wrong precedence."""
    found: list[Token] = []
    for child in node.children:
        if child.type in ("[", "]", "[[", "]]"):
            continue
        if child.type in ("binary_expression", "unary_expression", "parenthesized_expression"):
            found += _tokens(child)
        elif child.is_named and child.type != "test_operator":
            found.append(child)
        else:
            found.append(text_of(child).strip())
    return found


class Test:
    """A test, by recursive descent: or, and, not, then one comparison."""

    def __init__(self, tokens: list[Token], variables: Variables) -> None:
        self.tokens, self.variables, self.at = tokens, variables, 0

    def value(self) -> bool | None:
        """Whether the test holds; None also where it is not understood."""
        value = self._or()
        return value if self.at == len(self.tokens) else None

    def _peek(self) -> Token | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def _link(self, kind: str) -> bool:
        token = self._peek()
        found = isinstance(token, str) and LINKS.get(token) == kind
        self.at += found
        return found

    def _or(self) -> bool | None:
        value = self._and()
        while self._link("or"):
            value = _either(value, self._and())
        return value

    def _and(self) -> bool | None:
        value = self._one()
        while self._link("and"):
            value = _both(value, self._one())
        return value

    def _one(self) -> bool | None:
        token = self._peek()
        self.at += 1
        if token == "!":
            return _not(self._one())
        if token == "(":
            value = self._or()
            self.at += 1
            return value
        if isinstance(token, str):
            return self._unary(token)
        if token is None:
            return False
        following = self._peek()
        if isinstance(following, str) and (following in NUMBERS or following in TEXTS):
            self.at += 1
            right = self._peek()
            self.at += 1
            return self._compare(token, following, right if isinstance(right, Node) else None)
        text = self._text(token, may_be_unset=True)
        return None if text is None else bool(text)

    def _unary(self, symbol: str) -> bool | None:
        operand = self._peek()
        self.at += 1
        text = self._text(operand, may_be_unset=True) if isinstance(operand, Node) else ""
        if symbol not in ("-z", "-n") or text is None:
            return None  # -f, -d: what the script's machine has
        return (not text) == (symbol == "-z")

    def _text(self, node: Node | None, *, may_be_unset: bool = False) -> str | None:
        """The operand; None if it is not known. may_be_unset: a variable that no line sets is empty, and noted."""
        before = len(self.variables.unknown)
        text = expand_text(node, self.variables)
        if may_be_unset and (found := MARK.fullmatch(text)) and int(found[1]) >= before:
            name = self.variables.shown(text).strip("${}")
            if re.fullmatch(r"[A-Za-z_]\w*", name):
                self.variables.unset.add(name)
                return ""
        return None if MARK.search(text) else text

    def _compare(self, left_node: Node, symbol: str, right_node: Node | None) -> bool | None:
        left, right = self._text(left_node), self._text(right_node)
        if left is None or right is None or symbol in ("<", ">", "=~"):
            return None
        if symbol in NUMBERS:
            whole = all(re.fullmatch(r"\s*-?[0-9]+\s*", each) for each in (left, right))
            return NUMBERS[symbol](int(left), int(right)) if whole else None
        equal = fnmatch.fnmatchcase(left, right) if right_node and right_node.type != "string" else left == right
        return equal if symbol != "!=" else not equal
