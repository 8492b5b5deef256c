"""What the READMEs say is true: the paths exist, the commands run, both languages say the same."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "README.zh-CN.md")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
ASSIGNMENT = re.compile(r"^([A-Z][A-Z0-9_]*)=(\S*)$")


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(name: str) -> list[str]:
    """Each command of the bash blocks, on one line."""
    blocks = [body for language, body in BLOCK.findall(text(name)) if language == "bash"]
    return [line.strip() for body in blocks for line in body.replace("\\\n", " ").splitlines() if line.strip()]


def split(command: str) -> tuple[dict[str, str], list[str]]:
    """(settings before the program, the program's words)."""
    words = command.split()
    settings = {}
    while found := ASSIGNMENT.match(words[0]):
        settings[found[1]] = found[2]
        words.pop(0)
    return settings, words


ALL = commands("README.md")


def test_both_languages_have_the_same_commands_headings_and_links() -> None:
    english, chinese = (text(name) for name in READMES)
    assert commands("README.md") == commands("README.zh-CN.md")
    levels = [re.findall(r"^(#+) ", BLOCK.sub("", each), re.M) for each in (english, chinese)]
    assert levels[0] == levels[1]
    links = [set(re.findall(r"\]\(([^)]+)\)", each)) - set(READMES) for each in (english, chinese)]
    assert links[0] == links[1]
    code = [set(re.findall(r"`([^`\n]+)`", BLOCK.sub("", each))) for each in (english, chinese)]
    assert code[0] == code[1], code[0] ^ code[1]


@pytest.mark.parametrize("name", READMES)
def test_every_path_that_is_named_exists(name: str) -> None:
    content = text(name)
    named = re.findall(r"\]\(([^)#:]+)\)", content)
    named += re.findall(r"`((?:common|cpu|nvidia|metax|docker|tests|docs|requirements)/[^`\s]*)`", content)
    tree = next(body for _, body in BLOCK.findall(content) if "common/\n" in body)
    folder = ""
    for line in tree.splitlines():
        words = re.split(r"\s{2,}", line.strip())[0].split()
        named += [folder + word if line.startswith(" ") else word for word in words]
        folder = folder if line.startswith(" ") else words[-1]
    assert len(named) > 25
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("command", [each for each in ALL if re.search(r"bash \w+/\d_", each)])
def test_a_command_of_a_step_becomes_one_python_command(command: str) -> None:
    settings, (_, script, *_) = split(command)
    declared = text(script) + text("common/shell/lib.sh")  # lib.sh: for every step
    known = set(re.findall(r'^: "\$\{([A-Z0-9_]+):=', declared, re.M))
    assert settings.keys() <= known
    dry = command.replace(" -- ", " -n -- ", 1) if " -- " in command else f"{command} -n"
    done = subprocess.run(dry, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and " -m common." in done.stdout
    for name, value in settings.items():
        assert name in ("CONVERT_TYPE", "SETTINGS") or value in done.stdout, name


@pytest.mark.parametrize("command", [each for each in ALL if each.startswith("python -m")])
def test_a_python_command_has_the_flags_that_are_shown(command: str) -> None:
    _, words = split(command)
    module = words[: next(i for i, word in enumerate(words) if word.startswith(("--", "/")))]
    result = subprocess.run(
        [sys.executable, *module[1:], "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(word in result.stdout for word in words if word.startswith("--"))


@pytest.mark.parametrize("command", [each for each in ALL if not re.search(r"bash \w+/\d_|^python -m", each)])
def test_every_other_command_names_files_and_settings_that_exist(command: str) -> None:
    settings, words = split(command)
    setup = text("common/shell/setup_venv.sh")
    assert all(name in setup for name in settings)
    if words[0] == "docker" and words[1] == "build":
        assert (ROOT / words[words.index("-f") + 1]).is_file()
    elif words[0] == "docker":
        assert f"docker build -f docker/{words[-1].split(':')[1]}.Dockerfile -t {words[-1]} ." in ALL
    else:
        assert words[0] == "bash" and (ROOT / words[1]).is_file()
