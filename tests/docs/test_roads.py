"""docs/en and docs/zh: the same commands and figures in both; the kit accepts the commands and prints the figures."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.docs.roads import (
    FIGURE,
    LANGUAGES,
    PAGES,
    ROADS,
    ROOT,
    blocks,
    commands,
    figures,
    is_printed,
    prose,
    split,
    text,
)  # fmt: skip
from tests.recipes import LONG, write_config

STEP = re.compile(r"bash (nvidia|metax|cpu)/\d_\S+\.sh")
ALL = sorted({command for page in PAGES for command in commands(page)})
STEPS = [each for each in ALL if STEP.search(each)]
MODULES = [each for each in ALL if each.startswith("python -m ")]
OTHERS = [each for each in ALL if each not in STEPS and each not in MODULES]
# Programs that the machine or another project brings; the kit's own commands are run.
FOREIGN = (
    "nvidia-smi", "hf", "head", "tail", "pip", "vllm", "curl", "kubectl", "sbatch", "docker", "bash", "export",
    "source", "echo",
)  # fmt: skip
MAX_LINES = 120


def run(command: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "VENV")}
    environment |= {"PYTHON": sys.executable} | more
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in place of /models, with the config.json of the sizes that the pages name."""
    folder = tmp_path_factory.mktemp("models")
    for size in ("0.5B", "1.5B", "3B", "7B", "32B", "72B"):
        write_config(folder / f"Qwen2.5-{size}", size)
    write_config(folder / "Qwen2.5-7B-Instruct", "7B")
    write_config(folder / "Qwen2.5-7B-128K", "7B", LONG["128K"][1])
    yield folder


@cache
def estimate(command: str, models: Path) -> str:
    done = run(command.replace("python", sys.executable, 1).replace("/models", str(models)))
    assert done.returncode == 0, done.stderr
    return done.stdout


def estimates(page: str, models: Path) -> str:
    """What all estimates of a page print, with 0 rows or not."""
    return "".join(estimate(each, models) for each in commands(page) if "common.estimate" in each)


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_have_the_same_blocks_headings_links_code_and_figures(page: str) -> None:
    english, chinese = (text(language, page) for language in LANGUAGES)
    assert [blocks("en", page, kind) for kind in ("bash", "text")] == [
        blocks("zh", page, kind) for kind in ("bash", "text")
    ]
    levels = [re.findall(r"^(#+) ", prose(language, page), re.M) for language in LANGUAGES]
    assert levels[0] == levels[1]
    links = [set(re.findall(r"\]\(([^)]+)\)", each)) for each in (english, chinese)]
    assert links[0] - {f"../zh/{page}"} == links[1] - {f"../en/{page}"}
    code = [set(re.findall(r"`([^`\n]+)`", prose(language, page))) for language in LANGUAGES]
    assert code[0] == code[1], code[0] ^ code[1]
    assert figures("en", page) == figures("zh", page)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_is_named_exists(page: str, language: str) -> None:
    content = text(language, page)
    links = re.findall(r"\]\(([^)#:]+)\)", content)
    assert len(links) > 2
    assert [each for each in links if not (ROOT / "docs" / language / each).exists()] == []
    named = re.findall(r"(?<![\w/])((?:common|cpu|nvidia|metax|docker|docs|requirements)/[\w./-]*\w)", content)
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("page", ROADS)
def test_a_road_is_short(page: str, language: str) -> None:
    assert len(text(language, page).splitlines()) <= MAX_LINES


def python_words(step: str) -> list[str]:
    """The module and arguments of the Python command that a step's dry run prints."""
    done = run(f"{step} --dry-run" if " -- " not in step else step.replace(" -- ", " --dry-run -- "))
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1, done.stderr
    words = shlex.split(done.stdout)
    return words[words.index("-m") + 1 :]


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int, str]]:
    """By command: exit status and output of its Python command with --help at its end.

    argparse reads what stands before --help first, and refuses a value of the wrong kind.
    """
    wrong = next(each for each in STEPS if "MICRO_BATCH_SIZE=4" in each and " -- " not in each)
    asked = {step: python_words(step) for step in STEPS} | {command: command.split()[2:] for command in MODULES}
    asked["wrong"] = python_words(wrong.replace("MICRO_BATCH_SIZE=4", "MICRO_BATCH_SIZE=four"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.docs.forked"], cwd=ROOT, text=True, capture_output=True, check=True,
        input=json.dumps([[*words, "--help"] for words in asked.values()]),
    )  # fmt: skip
    return {command: (status, output) for command, (status, output) in zip(asked, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize("command", STEPS)
def test_a_step_accepts_its_settings_and_python_their_values(command: str, answers: dict[str, tuple[int, str]]) -> None:
    settings, words = split(command)
    script = (ROOT / words[1]).read_text() + (ROOT / "common" / "shell" / "lib.sh").read_text()
    assert settings.keys() <= set(re.findall(r'^: "\$\{([A-Z0-9_]+):=', script, re.M))
    status, output = answers[command]
    assert status == 0 and output.startswith("usage: python -m common."), output
    assert [word for word in words if word.startswith("--") and word != "--" and word not in output] == []


def test_a_value_that_python_does_not_know_would_be_seen(answers: dict[str, tuple[int, str]]) -> None:
    status, output = answers["wrong"]
    assert status == 2 and "invalid int value: 'four'" in output


@pytest.mark.parametrize("command", MODULES)
def test_a_python_command_has_the_flags_and_values_that_are_shown(
    command: str, answers: dict[str, tuple[int, str]]
) -> None:
    status, output = answers[command]
    assert status == 0, output
    assert [word for word in command.split() if word.startswith("--") and word not in output] == []


@pytest.mark.parametrize("command", OTHERS)
def test_every_other_command_is_known_and_its_settings_and_flags_exist(command: str) -> None:
    settings, words = split(command[3:].lstrip("$(").rstrip(")") if command.startswith("id=") else command)
    assert words and words[0] in FOREIGN and not settings
    exported = [word for word in words[1:] if re.match(r"[A-Z_]+=", word)] if words[0] == "export" else []
    scripts = "".join(path.read_text() for path in (ROOT / "nvidia").glob("[0-9]_*.sh"))
    known = scripts + (ROOT / "common" / "shell" / "lib.sh").read_text()
    assert [each for each in exported if f'"${{{each.split("=")[0]}:=' not in known] == []
    if words[:2] == ["docker", "build"]:
        dockerfile = (ROOT / words[words.index("-f") + 1]).read_text()
        given = [words[i + 1] for i, word in enumerate(words) if word == "--build-arg"]
        assert given and all(f"ARG {each.split('=')[0]}" in dockerfile for each in given)
        assert all(each in dockerfile for each in given), "the head of the Dockerfile names this base"
    elif words[:2] == ["docker", "run"]:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        base = f"docker run {' '.join(words[2 : words.index('-v')])} {words[-1]}"
        assert base in readme
    elif words[0] == "hf":
        shown = run(f"{Path(sys.executable).parent / 'hf'} download --help").stdout
        assert words[1] == "download" and all(each in shown for each in words if each.startswith("--"))
    elif words[0] == "bash":
        done = run(f"bash {words[1]} --help")
        assert done.returncode == 0 and all(word in done.stdout for word in words[2:]), done.stderr


@pytest.mark.parametrize("page", [page for page in ROADS if blocks("en", page, "text")])
def test_a_block_of_estimates_is_what_the_command_prints_today(page: str, models: Path) -> None:
    printed = estimates(page, models).splitlines()
    for body in blocks("en", page, "text"):
        assert [line for line in body.splitlines() if line not in printed] == []


@pytest.mark.parametrize("page", ROADS)
def test_a_figure_with_a_unit_is_estimated_or_measured(page: str, models: Path) -> None:
    """24, 80 GB and the like are sizes of cards; 2 GB/s is the estimate's --disk-gb-s."""
    printed = set(re.findall(r"\d[\d,]*(?:\.\d+)?", estimates(page, models)))
    printed |= set(re.findall(r"\d[\d,]*(?:\.\d+)?", " ".join(commands(page))))
    measured = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    cards = {"80 GB", "24 GB", "24 GiB"}
    unknown = [
        f"{number} {unit}"
        for number, unit in FIGURE.findall(prose("en", page))
        if f"{number} {unit}" not in cards and number not in printed and f"{number} {unit}" not in measured
    ]
    assert unknown == []


def test_the_table_of_one_card_is_what_the_estimates_print(models: Path) -> None:
    rows = re.findall(
        r"^\| ([\d.]+B) \| `(\w+)` \| (\d+), `(\w+)` \| ([\d.]+) GiB(?:, and ([\d.]+) GiB of host memory)? \| (\w+)",
        text("en", "one-card.md"), re.M,
    )  # fmt: skip
    assert len(rows) == 5
    for size, state, micro_batch, recompute, peak, host, fits in rows:
        command = next(
            each for each in commands("one-card.md")
            if f"Qwen2.5-{size} " in each and (f"--optimizer-state {state}" in each or state == "fp32")
        )  # fmt: skip
        printed = estimate(command, models)
        row = next(
            line.split() for line in printed.splitlines() if line.split()[4:6] == [micro_batch, recompute]
        )  # fmt: skip
        assert (row[11], row[12]) == (peak, fits)
        assert not host or f"keeps {host} GiB in the memory of the hosts" in printed


def test_the_smallest_layouts_that_one_card_names_are_the_smallest(models: Path) -> None:
    command = next(each for each in commands("one-card.md") if "1.5B" in each and "--optimizer-state" not in each)
    printed = estimate(command, models).splitlines()
    peaks = [float(line.split()[11]) for line in printed if re.match(r" *1 +1 +1 +1 ", line)]
    assert f"needs {min(peaks):.2f} GiB at least" in prose("en", "one-card.md")


@pytest.mark.parametrize(
    "message", [line for body in blocks("en", "troubleshooting.md", "text") for line in body.splitlines()]
)
def test_a_quoted_message_is_the_kits(message: str) -> None:
    assert len(message) > 10 and is_printed(message)


def test_a_message_that_the_kit_does_not_print_is_told_apart() -> None:
    assert is_printed("GPUS=..., but torch sees ... devices")
    assert not is_printed("GPUS=..., but torch sees 8 devices") and not is_printed("torch found ... devices")
