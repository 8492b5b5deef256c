"""A shell script as the assignments it makes and the commands it would run: read with a grammar, never executed."""

import fnmatch
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import tree_sitter_bash
from tree_sitter import Language, Node, Parser

from common.adopt.conditions import holds
from common.adopt.variables import MARK, Assignment, Variables, from_outside
from common.adopt.words import expand_text, expand_words, text_of

SHOWN = 100  # of a piece of the script, in a message
CALLS = 20  # of functions within each other
STOPS = ("exit", "return", "exec")


@dataclass(frozen=True)
class Command:
    """A command that the script would run: its words expanded, the names of the variables read for it."""

    words: tuple[str, ...]
    line: int
    read: frozenset[str]


@dataclass
class Script:
    """What a script does, in order. skipped: (line, text) of branches not taken; unread: of what was not read."""

    variables: Variables
    assignments: list[Assignment] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)
    unread: list[tuple[int, str]] = field(default_factory=list)
    chosen_by: set[str] = field(default_factory=set)


class _Stop(Exception):  # noqa: N818 - the script ends, no error
    pass


def read_script(text: str, arguments: Sequence[str] | None = None, given: Mapping[str, str] | None = None) -> Script:
    """What the script `text` does with `arguments`, and with the variables `given`, whatever its lines assign.

    Without `arguments`, $1 and the others are not known.
    """
    text = re.sub(r"^(\s*)<<", r"\1: <<", text, flags=re.M)  # a here-document of no command is a comment
    root = Parser(Language(tree_sitter_bash.language())).parse(text.encode()).root_node
    reader = _Reader(Script(from_outside(given or {}, _assigned(root), arguments)))
    for node in _errors(root):
        reader.leave(node, "this is no bash that could be read")
    with suppress(_Stop):
        reader.block(root.children)
    return reader.script


def line_of(node: Node) -> int:
    """The line of the script that `node` begins in, from 1."""
    return node.start_point[0] + 1


def _walk(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _walk(child)


def _assigned(root: Node) -> set[str]:
    """The names that any line of the script assigns, in a branch that is not taken too."""
    names = set()
    for node in _walk(root):
        if node.type == "variable_assignment" and (target := node.child_by_field_name("name")):
            names.add(text_of(target).split("[")[0])
    return names


def _errors(root: Node) -> list[Node]:
    found = [
        node.parent or node if node.is_missing else node for node in _walk(root) if node.is_missing or node.is_error
    ]
    return list(dict.fromkeys(found)) if root.has_error else []


class _Reader:
    """Goes through the statements as bash would."""

    def __init__(self, script: Script) -> None:
        self.script, self.variables = script, script.variables
        self.functions: dict[str, Node] = {}
        self.depth = 0

    def leave(self, node: Node, why: str) -> None:
        """Notes a statement that is not read."""
        self.variables.doubtful |= _assigned(node)
        self.script.unread.append((line_of(node), f"{_lines([node])}: {why}: {_short(text_of(node))}"))

    def block(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            self.statement(node)

    def statement(self, node: Node) -> None:
        kind = node.type
        if kind == "variable_assignment":
            self.assign(node, exported=False)
        elif kind in ("declaration_command", "variable_assignments"):
            for child in node.children:
                if child.type == "variable_assignment":
                    self.assign(child, exported=kind == "declaration_command" and text_of(node).startswith("export"))
        elif kind == "command":
            self.command(node)
        elif kind == "if_statement":
            self.if_statement(node)
        elif kind == "case_statement":
            self.case_statement(node)
        elif kind == "list":
            self.list_of_two(node)
        elif kind == "redirected_statement":
            self.statement(node.children[0])
        elif kind == "function_definition":
            self.functions[text_of(node.child_by_field_name("name") or node)] = node
        elif kind in ("for_statement", "c_style_for_statement", "while_statement"):
            self.leave(node, "a loop is not read")
        elif kind in ("program", "compound_statement", "subshell", "pipeline", "negated_command", "do_group"):
            self.block(node.children)

    def assign(self, node: Node, exported: bool) -> None:
        target, value = node.child_by_field_name("name"), node.child_by_field_name("value")
        name = text_of(target or node).split("[")[0]
        before, self.variables.read = self.variables.read, set()
        append = any(child.type == "+=" for child in node.children)
        if target is not None and target.type == "subscript":
            self.leave(node, "one element of an array is set")
        elif value is not None and value.type == "array":
            words = [word for child in value.children if child.is_named and child.type != "comment"
                     for word in expand_words(child, self.variables)]  # fmt: skip
            self.variables.assign(name, words, self.variables.read, append=append)
        else:
            text = expand_text(value, self.variables)
            text = self.variables.values.get(name, [""])[0] + text if append else text
            self.variables.assign(
                name, [text], self.variables.read | ({name} & set(self.variables.sources) if append else set())
            )
            if value is not None and value.type == "arithmetic_expansion" and not MARK.search(text):
                self.variables.arithmetic[name] = self._calculation(value, text)
        self.variables.read = before
        shown = self.variables.shown(" ".join(self.variables.values.get(name, [])))
        self.script.assignments.append(Assignment(name, shown, line_of(node), exported))

    def _calculation(self, node: Node, result: str) -> str:
        """`TOKENS / BATCH / LENGTH = 10000 / 8 / 128 = 9`."""
        start, raw, numbers, end = node.start_byte, node.text or b"", "", len("$((")
        for leaf in _operands(node):
            name = leaf.type == "variable_name"
            value = self.variables.get(text_of(leaf), "")[0] if name else expand_text(leaf, self.variables)
            numbers += raw[end : leaf.start_byte - start].decode() + value
            end = leaf.end_byte - start
        numbers = (numbers + raw[end:-2].decode()).strip()
        source = text_of(node)[3:-2].strip()
        return " = ".join(dict.fromkeys(" ".join(each.split()) for each in (source, numbers, result)))

    def command(self, node: Node) -> None:
        before, self.variables.read = self.variables.read, set()
        words: list[str] = []
        for child in node.children:
            if child.type == "variable_assignment":
                self.assign(child, exported=True)
            elif child.is_named and child.type not in ("herestring_redirect", "file_redirect"):
                words += expand_words(child, self.variables)
        for name in self.variables.defaulted:
            value = self.variables.shown(self.variables.values[name][0])
            self.script.assignments.append(Assignment(name, value, line_of(node), False))
        self.variables.defaulted.clear()
        read, self.variables.read = frozenset(self.variables.read), before
        if words and words[0] == "eval":
            try:
                words = shlex.split(" ".join(words[1:]))
            except ValueError as error:  # quotes that do not match
                self.leave(node, f"eval gets a text with {error}")
                return
        if not words or words[0] == ":":
            return
        if words[0] in self.functions:
            self.call(self.functions[words[0]], words[1:], node)
            return
        self.script.commands.append(Command(tuple(words), line_of(node), read))
        if words[0] in STOPS:
            raise _Stop

    def call(self, function: Node, arguments: list[str], node: Node) -> None:
        body = function.child_by_field_name("body")
        if body is None or self.depth >= CALLS:
            self.leave(node, "the function calls itself")
            return
        before, self.variables.arguments = self.variables.arguments, arguments
        self.depth += 1
        self.block(body.children)
        self.depth -= 1
        self.variables.arguments = before

    def if_statement(self, node: Node) -> None:
        """Reads the branch whose condition holds; all others are noted."""
        taken: bool | None = False
        for condition, body in _branches(node):
            value = self.decide(condition) if condition is not None else True
            if taken or value is False:
                self.skip(body, condition)
            elif taken is None or value is None:
                taken = None
                self.undecided(condition or node.children[1], body)
            else:
                taken = True
                self.block(body)

    def decide(self, condition: Node) -> bool | None:
        before, self.variables.read = self.variables.read, set()
        value = holds(condition, self.variables)
        self.script.chosen_by |= self.variables.read
        self.variables.read = before
        return value

    def skip(self, body: Sequence[Node], condition: Node | None) -> None:
        if body:
            what = f"not taken: {_short(text_of(condition))}" if condition is not None else "not taken: else"
            self.script.skipped.append((line_of(body[0]), f"{_lines(body)}: {what}"))

    def undecided(self, condition: Node, body: Sequence[Node]) -> None:
        if body:
            for each in body:
                self.variables.doubtful |= _assigned(each)
            source = _short(text_of(condition))
            self.script.unread.append((line_of(condition), f"{_lines(body)}: whether {source} holds is not known here"))

    def case_statement(self, node: Node) -> None:
        value = expand_text(node.child_by_field_name("value"), self.variables)
        known = value == self.variables.shown(value)
        taken = False
        for item in (child for child in node.children if child.type == "case_item"):
            patterns = [expand_text(each, self.variables) for each in item.children_by_field_name("value")]
            values = set(item.children_by_field_name("value"))
            body = [child for child in item.children if child.is_named and child not in values]
            if not known:
                self.undecided(node.child_by_field_name("value") or node, body)
            elif not taken and any(fnmatch.fnmatchcase(value, pattern) for pattern in patterns):
                taken = True
                self.block(body)
            else:
                self.skip(body, item.children[0])

    def list_of_two(self, node: Node) -> None:
        """`A && B`, `A || B`: B after a test that holds or fails, after && a command, never after || a command."""
        left, right = node.children[0], node.children[-1]
        value = self.decide(left)
        is_test = left.type in ("test_command", "negated_command", "compound_statement")
        if not is_test:
            self.statement(left)
            value = True
        wanted = node.children[1].type == "&&"
        if value is None:
            self.undecided(left, [right])
        elif value is wanted:
            self.statement(right)
        else:
            self.skip([right], left)


def _branches(node: Node) -> Iterator[tuple[Node | None, list[Node]]]:
    """(condition, or None for `else`; the statements) of each branch of an `if`."""
    condition, body, in_body = None, [], node.type == "else_clause"
    for child in node.children:
        if child.type in ("elif_clause", "else_clause"):
            continue
        if child.type == "then":
            in_body = True
        elif child.is_named and child.type != "comment":
            if in_body:
                body.append(child)
            elif condition is None:
                condition = child
    yield condition, body
    for child in node.children:
        if child.type in ("elif_clause", "else_clause"):
            yield from _branches(child)


def _operands(node: Node) -> Iterator[Node]:
    for child in node.children:
        if child.type in ("simple_expansion", "expansion", "variable_name"):
            yield child
        else:
            yield from _operands(child)


def _lines(nodes: Sequence[Node]) -> str:
    first, last = line_of(nodes[0]), nodes[-1].end_point[0] + 1
    return f"line {first}" if first == last else f"lines {first} to {last}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."
