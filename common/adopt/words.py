"""Words of a shell script expanded as bash does it, without running anything; what needs a run becomes a mark."""

import fnmatch
import re

from tree_sitter import Node

from common.adopt.arithmetic import evaluate
from common.adopt.variables import MARK, Variables

# A piece of a word: its text, and whether it is split at blanks. None ends a word, as between elements of "${a[@]}".
Piece = tuple[str, bool] | None

BLANK = re.compile(r"[ \t\n]+")


def text_of(node: Node) -> str:
    """The source text of `node`."""
    return (node.text or b"").decode("utf-8", "replace")


def expand_words(node: Node, variables: Variables) -> list[str]:
    """The words that `node`, an argument or an element of an array, becomes; none for an empty unquoted variable."""
    return split(pieces(node, variables, quoted=False))


def expand_text(node: Node | None, variables: Variables) -> str:
    """`node` as one text, not split: the right side of an assignment, an operand of a test."""
    if node is None:
        return ""
    found = pieces(node, variables, quoted=True)
    return "".join(" " if each is None else each[0] for each in found)


def split(found: list[Piece]) -> list[str]:
    """The words of pieces: unquoted ones end words at their blanks, and make none if they are empty."""
    words: list[str] = []
    word: str | None = None
    for piece in [*found, None]:
        if piece is None:
            words += [] if word is None else [word]
            word = None
        elif not piece[1]:
            word = (word or "") + piece[0]
        else:
            parts = BLANK.split(piece[0])
            for number, part in enumerate(parts):
                if number and word is not None:
                    words.append(word)
                    word = None
                if part:
                    word = (word or "") + part
    return words


def pieces(node: Node, variables: Variables, quoted: bool) -> list[Piece]:
    """The pieces of `node`; quoted: it stands in double quotes, or where bash does not split."""
    source, kind = text_of(node), node.type
    if kind in (
        "word",
        "number",
        "extglob_pattern",
        "regex",
        "test_operator",
        "variable_name",
        "special_variable_name",
    ):
        return [(re.sub(r"\\(\n|.)", lambda found: found[1].strip("\n"), source, flags=re.S), False)]
    if kind == "raw_string":
        return [(source[1:-1], False)]
    if kind == "ansi_c_string":
        return [(source[2:-1].replace("\\n", "\n").replace("\\t", "\t"), False)]
    if kind in ("string", "translated_string"):
        return _in_quotes(node, variables)
    if kind in ("concatenation", "command_name"):
        return [piece for child in node.children for piece in pieces(child, variables, quoted)]
    if kind in ("simple_expansion", "expansion"):
        blank = _unescaped(source[: source.index("$")])  # the grammar counts blanks before ${ as its own
        return [(blank, not quoted)] * bool(blank) + _expansion(node, variables, quoted)
    if kind == "arithmetic_expansion":
        return [(_arithmetic(node, variables), not quoted)]
    return [(variables.mark(source), False)]  # a command or process substitution, braces


def calculate(node: Node, variables: Variables) -> int | None:
    """The value of an arithmetic expression, `$((...))` or `((...))`; None if an operand is not known."""

    def operand(each: Node) -> str:
        if each.type in ("variable_name", "word"):
            return variables.get(text_of(each), text_of(each))[0]
        return expand_text(each, variables)

    return evaluate(node, operand)


def _arithmetic(node: Node, variables: Variables) -> str:
    value = calculate(node, variables)
    return variables.mark(text_of(node)) if value is None else str(value)


def _in_quotes(node: Node, variables: Variables) -> list[Piece]:
    found: list[Piece] = [("", False)]
    whole, at = node.text or b"", node.start_byte
    end = node.start_byte
    for child in node.children:
        gap = whole[end - at : child.start_byte - at].decode("utf-8", "replace")
        end = child.end_byte
        if child.type == '"':
            literal = gap + text_of(child).replace('"', "")
            found.append((_unescaped(literal), False))
        elif child.type == "string_content" or not child.is_named:
            found.append((_unescaped(gap + text_of(child)), False))
        else:
            found.append((gap, False))
            found += [piece and (piece[0], False) for piece in pieces(child, variables, quoted=True)]
    return found


def _unescaped(text: str) -> str:
    return re.sub(r'\\([\n$`"\\])', lambda found: found[1].strip("\n"), text)


def _expansion(node: Node, variables: Variables, quoted: bool) -> list[Piece]:
    """`$X`, `${X}`, `${X:-default}`, `${X[2]}`, `${#X[@]}`, `${X%.sh}`."""
    source = text_of(node)
    source = source[source.index("$") :]
    children = [child for child in node.children if child.is_named or not re.search(r"\$\{?$|^}$", text_of(child))]
    prefix = text_of(children.pop(0)) if children and not children[0].is_named else ""
    if not children:
        return [(variables.mark(source), not quoted)]
    target, rest = children[0], children[1:]
    words, every = _target(target, source, variables)
    if prefix == "#":
        return [(str(len(words) if every else len(words[0])), not quoted)]
    if prefix:
        return [(variables.mark(source), not quoted)]
    if rest:
        return _changed(words, target, rest, variables, quoted, source)
    found: list[Piece] = []
    for number, word in enumerate(words):
        found += [None] * bool(number and every) + [(word, not quoted)]
    return found if words else []


def _target(target: Node, source: str, variables: Variables) -> tuple[list[str], bool]:
    """(the words of the variable or of its element, whether all elements of an array are meant)."""
    if target.type != "subscript":
        name = text_of(target)
        words = variables.get(name, source)
        return (words, True) if name in ("@", "*") else (words[:1] or [""], False)
    name = text_of(target.child_by_field_name("name") or target)
    index = target.child_by_field_name("index")
    words = variables.get(name, source)
    where = expand_text(index, variables)
    if where in ("@", "*"):
        return words, True
    number = int(where) if re.fullmatch(r"-?[0-9]+", where) else None
    if number is None or not variables.known(name):
        return [variables.mark(source)], False
    return (words[number : number + 1 or None] or [""])[:1], False


def _changed(
    words: list[str], target: Node, rest: list[Node], variables: Variables, quoted: bool, source: str
) -> list[Piece]:
    """The pieces of `${X:-word}` and the like, and of `${X%pattern}`."""
    operator, name = text_of(rest[0]), text_of(target)
    operand = rest[1] if len(rest) > 1 else None
    value = " ".join(words)
    if operator in (":-", "-", ":=", "=", ":+", "+", ":?", "?"):
        missing = not variables.known(name) or (not value if operator[0] == ":" else name not in variables.values)
        if not variables.known(name):
            variables.unset.add(name)
        if operator[-1] == "+":
            return [] if missing or operand is None else pieces(operand, variables, quoted)
        if not missing:
            return [(value, not quoted)]
        if operator[-1] == "?":
            return [(variables.mark(source), not quoted)]
        found = [] if operand is None else pieces(operand, variables, quoted)
        if operator[-1] == "=":
            variables.assign(name, [expand_text(operand, variables)], ())
            variables.defaulted.append(name)
        return found or [("", not quoted)]
    if operator in ("%", "%%", "#", "##") and not MARK.search(value) and operand is not None:
        return [(_trimmed(value, operator, expand_text(operand, variables)), not quoted)]
    return [(variables.mark(source), not quoted)]


def _trimmed(value: str, operator: str, pattern: str) -> str:
    matches = re.compile(fnmatch.translate(pattern)).match
    cuts = range(len(value) + 1) if operator in ("#", "%%") else range(len(value), -1, -1)
    for cut in cuts:
        if matches(value[:cut] if operator[0] == "#" else value[cut:]):
            return value[cut:] if operator[0] == "#" else value[:cut]
    return value
