"""docs/metax.md and what it refers to: every variable, and commands that a script and its Python accept."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "metax.md").read_text(encoding="utf-8")
BLOCKS = [body.replace("\\\n", " ") for body in re.findall(r"^ *```bash\n(.*?)^ *```$", TEXT, re.M | re.S)]
COMMANDS = [" ".join(line.split()) for body in BLOCKS for line in body.splitlines() if line.strip()]
KEEP = {"PATH": "/usr/bin:/bin", "KIT_TEST_ON_CPU": "true"}


def section(title: str) -> str:
    return TEXT.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_environment_is_that_of_the_script() -> None:
    declared = dict(re.findall(r'^: "\$\{([A-Z_0-9]+):=(.*?)\}" +#', (ROOT / "metax" / "env.sh").read_text(), re.M))
    exported, left_out = section("Environment").split("Left out")
    rows = dict(re.findall(r"^\| `([A-Z_0-9]+)` \| (\S+)", exported, re.M))
    assert rows.keys() == declared.keys()
    plain = {name: value for name, value in declared.items() if "$" not in value}
    assert {name: rows[name].strip("`") for name in plain} == plain
    names = re.findall(r"`([A-Z_0-9]{6,})(?:=\S+)?`", left_out)
    assert len(names) > 8 and not {*names} & {*declared}


def test_the_misspelt_variables_of_old_scripts_are_set_nowhere() -> None:
    scripts = "\n".join(path.read_text() for path in (ROOT / "metax").glob("*.sh"))
    assert not re.search("FORCE_ACTIVATE_WAIT|SAME_RANK_A100|SSL_CERT_FILE|MCCL_IB_HCA=|SOCKET_IFNAME=", scripts)


def test_every_step_has_a_row_in_the_form() -> None:
    body = section("To be run by a person with the hardware")
    steps = re.findall(r"^(\d+)\. ", body, re.M)
    assert steps == re.findall(r"^\| (\d+) \|", body, re.M) == [str(i) for i in range(1, 16)]


@pytest.mark.parametrize("command", [each for each in COMMANDS if "metax/" in each and "docker" not in each])
def test_a_step_takes_the_settings_that_are_shown(command: str) -> None:
    script = re.findall(r"bash (metax/\S+\.sh)", command)[0]
    known = set(re.findall(r'^: "\$\{([A-Z0-9_]+):=', (ROOT / script).read_text(), re.M))
    assert set(re.findall(r"(?:^| )([A-Z][A-Z0-9_]+)=", command)) <= known
    done = subprocess.run(f"{command} -n", shell=True, cwd=ROOT, capture_output=True, text=True, env=KEEP, check=False)
    assert done.returncode == 0 and "KIT_PLATFORM=metax" in done.stdout, done.stderr


def test_the_commands_are_found() -> None:
    assert len(COMMANDS) == 10 and sum(each.startswith("docker ") for each in COMMANDS) == 3
    newer, build, run = (each for each in COMMANDS if each.startswith("docker "))
    dockerfile = (ROOT / "docker" / "metax.Dockerfile").read_text()
    for name, value in re.findall(r"--build-arg (\w+)=(\S+)", newer):
        assert f"ARG {name}=" in dockerfile and f"{name}={value}" in dockerfile
    readme = (ROOT / "README.md").read_text().replace("\\\n", " ")
    assert build in readme and all(flag in readme for flag in run.split() if flag.startswith("--"))


def test_what_the_log_is_expected_to_say_is_what_the_code_says() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "common").rglob("*.py"))
    for phrase in ("core attention: %s", "optimizer: %s", "all bits agree", "was not run on"):
        assert phrase in code
    assert "core attention: flash_attn" in TEXT and "all bits agree" in TEXT
