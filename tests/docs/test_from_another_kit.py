"""from-another-kit.md in docs/en and docs/zh: the example's output is the command's, and both say the same."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from common.settings import declared
from tests.docs.test_readme import BLOCK, commands, split, text

ROOT = Path(__file__).parents[2]
PAGES = ("docs/en/from-another-kit.md", "docs/zh/from-another-kit.md")
COMMANDS = commands(PAGES[0])


def run(words: list[str], folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """A command in `folder`, with the kit on the path."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, **settings}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def blocks(page: str, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(text(page)) if kind == language]


def test_both_languages_have_the_same_blocks_headings_and_code() -> None:
    english, chinese = (text(page) for page in PAGES)
    assert BLOCK.findall(english) == BLOCK.findall(chinese)
    bare = [BLOCK.sub("", page) for page in (english, chinese)]
    levels = [re.findall(r"^(#+) |^(\|)", page, re.M) for page in bare]
    assert levels[0] == levels[1]
    code = [set(re.findall(r"`([^`\n]+)`", page)) for page in bare]
    assert code[0] == code[1], code[0] ^ code[1]


@pytest.mark.parametrize("page", PAGES)
def test_every_path_and_link_exists(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", text(page))
    assert links and [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
    named = re.findall(r"(?:common|cpu|nvidia|metax|docker|requirements)/[\w./-]+\w", text(page))
    assert len(named) > 5 and [path for path in named if not (ROOT / path).exists()] == []
    scripts = re.findall(r"`(\d_\w+\.sh)`", text(page))
    assert len(scripts) >= 4 and all((ROOT / "metax" / name).is_file() for name in scripts)


def test_settings_that_are_named_exist() -> None:
    old = {"SAVE_DIST_CHECKPOINT_PATH", "SAVE_TORCH_CHECKPOINT_PATH", "PYTHONPATH", "NAME", "VALUE", "SETTINGS"}
    code = " ".join(re.findall(r"`([^`\n]+)`", BLOCK.sub("", text(PAGES[0]))))
    named = set(re.findall(r"(?<![{\w-])[A-Z][A-Z_]{3,}\b", code))
    assert len(named) > 15 and named - old <= declared("nvidia/*.sh")


def test_the_example_prints_what_the_page_shows(tmp_path: Path) -> None:
    (tmp_path / "old.sh").write_text(blocks(PAGES[0], "sh")[0])
    said, settings = blocks(PAGES[0], "text")
    adopt, train = COMMANDS[:2]
    done = run([sys.executable, *shlex.split(adopt)[1:]], tmp_path)
    assert (done.returncode, done.stdout) == (0, said)
    written = (tmp_path / "my.env").read_text().splitlines(keepends=True)
    assert "".join(line for line in written if re.match(r"[A-Z0-9_]+=", line)) == settings
    given, words = split(train)
    trained = run([words[0], str(ROOT / words[1]), "-n"], tmp_path, **given)
    assert trained.returncode == 0 and "--train-iters 29002" in trained.stdout, trained.stderr


def test_the_example_of_arguments_is_read_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "run_mcore_qwen.sh").write_text((ROOT / "tests" / "old_scripts" / "pai.sh.txt").read_text())
    command = next(each for each in COMMANDS if "--args" in each)
    done = run([sys.executable, *shlex.split(command)[1:]], tmp_path)
    assert done.returncode == 0 and "SAVE_CHECKPOINT_PATH=/ckpt/out/checkpoint/tp-1-pp-1" in done.stdout, done.stderr
    assert re.search(r"^TRAIN_ITERS=97656\b", done.stdout, re.M)


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.startswith("python -m common.preprocess")])
def test_a_python_command_has_the_flags_that_are_shown(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    done = run([sys.executable, *words[1:4], "--help"], tmp_path)
    assert done.returncode == 0 and all(word in done.stdout for word in words if word.startswith("--"))


@pytest.mark.parametrize("vendor", ["metax", "nvidia"])
def test_the_commands_inside_an_image_are_those_of_its_dockerfile(vendor: str) -> None:
    dockerfile = text(f"docker/{vendor}.Dockerfile")
    version = re.search(r"^ARG MEGATRON_CORE=(\S+)", dockerfile, re.M)
    assert version and f"bash docker/install.sh {version[1]} requirements/{vendor}.txt" in text(PAGES[0])
    assert "PIP_CONSTRAINT=/opt/kit/constraints.txt" in dockerfile and f"bash {vendor}/doctor.sh" in text(PAGES[0])
