"""What the tests of docs/en and docs/zh read there: blocks, commands, figures; and the messages in the kit's code."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
LANGUAGES = ("en", "zh")
ROADS = ("sft-8-gpus.md", "one-card.md", "lora.md", "cpt-72b.md", "preferences.md", "long-rows.md")
PAGES = (*ROADS, "troubleshooting.md")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
ASSIGNMENT = re.compile(r"^([A-Z][A-Z0-9_]*)=")
# A number before a unit in the text: what an estimate or docs/benchmarks.md must have.
FIGURE = re.compile(r"(?<![\w.,/-])(\d[\d,]*(?:\.\d+)?) ?(tokens/s|GiB|GB|TB|min|%|h\b)")
PLACEHOLDER = re.compile(r"%[-+.\d]*[sdfgr]|%%|\x00")


@cache
def text(language: str, page: str) -> str:
    """The page."""
    return (ROOT / "docs" / language / page).read_text(encoding="utf-8")


def blocks(language: str, page: str, kind: str) -> list[str]:
    """The bodies of its blocks of that kind, as bash."""
    return [body for each, body in BLOCK.findall(text(language, page)) if each == kind]


def commands(page: str, language: str = "en") -> list[str]:
    """The commands of its bash blocks, each on one line."""
    bodies = (body.replace("\\\n", " ") for body in blocks(language, page, "bash"))
    return [line.strip() for body in bodies for line in body.splitlines() if line.strip()]


def split(command: str) -> tuple[dict[str, str], list[str]]:
    """(settings before the program, the program's words)."""
    words, settings = shlex.split(command), {}
    while words and (found := ASSIGNMENT.match(words[0])):
        settings[found[1]] = words.pop(0)[found.end() :]
    return settings, words


def prose(language: str, page: str) -> str:
    """The page without its blocks."""
    return BLOCK.sub("", text(language, page))


def figures(language: str, page: str) -> list[str]:
    """The figures of its text, each with its unit, sorted."""
    return sorted(f"{number} {unit}" for number, unit in FIGURE.findall(prose(language, page)))


@cache
def code_strings() -> list[str]:
    """Each string of common/, one NUL in place of each value, and each line of its shell scripts."""
    found: list[str] = []
    for path in sorted((ROOT / "common").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(PLACEHOLDER.sub(lambda match: "%" if match[0] == "%%" else "\0", node.value))
    for path in sorted((ROOT / "common" / "shell").glob("*.sh")):
        found += path.read_text(encoding="utf-8").splitlines()
    return found


def is_printed(message: str) -> bool:
    """Whether one string of the code has the message's words in their order, with a value at each `...`."""
    pattern = ".*\0.*".join(re.escape(part) for part in message.split("..."))
    return any(re.search(pattern, each, re.S) for each in code_strings())
