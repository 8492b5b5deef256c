"""`python -m common.adopt OLD_SCRIPT.sh`: an old training script as a file of settings; it is read, never executed."""

import argparse
import re
import shlex
from pathlib import Path

from common import errors
from common.adopt.adoption import adopt
from common.adopt.command_line import find_steps, started_script
from common.adopt.draft import PROBLEM, Draft
from common.adopt.report import problems, settings_file, summary
from common.adopt.shell import Script, read_script
from common.errors import KitError, reading, writing

VENDORS = ("nvidia", "metax", "cpu")
LARGEST_BYTES = 2**20  # of a script


def main() -> None:
    """Prints the settings, or writes them and prints the problems; exits 2 if the script holds no step."""
    arguments = parse_arguments()
    path: Path = arguments.script
    with reading(path):
        content = path.read_bytes()
    if len(content) > LARGEST_BYTES or b"\0" in content:
        raise KitError(f"{path} has {len(content):,} bytes or is no text: give a shell script of at most 1 MiB")
    try:
        words = shlex.split(arguments.args) if arguments.args is not None else None
    except ValueError as error:
        raise KitError(f"--args {arguments.args}: {error}: give the words as a shell reads them") from error
    script = read_script(content.decode("utf-8", "replace"), words, dict(arguments.set))
    draft, lines = adopted(script, path, arguments)
    if arguments.output is None:
        print(*lines, sep="\n")
        return
    with writing(arguments.output):
        arguments.output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(*problems(draft), sep="\n")
    print(f"{arguments.output}: {summary(draft, script)}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m common.adopt", description=__doc__)
    parser.add_argument(
        "script", type=Path, metavar="OLD_SCRIPT.sh", help="of the old kit, Pai-Megatron-Patch or Megatron-LM"
    )
    parser.add_argument(
        "--vendor", choices=VENDORS, default="nvidia", help="whose scripts will run it (default: nvidia)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the settings there, and print the problems only"
    )
    parser.add_argument("--args", metavar="WORDS", help="the old script's arguments, as one text: 'dsw 0.5B 1 8'")
    parser.add_argument(
        "--set", type=assignment, action="append", default=[], metavar="NAME=VALUE",
        help="a variable of the old script, whatever its lines assign; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--hf-model-path", type=Path, metavar="FOLDER", help="compare the shape flags with its config.json"
    )
    return parser.parse_args()


def assignment(text: str) -> tuple[str, str]:
    """(name, value) of NAME=VALUE."""
    found = re.fullmatch(r"([A-Za-z_]\w*)=(.*)", text, re.S)
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    return found[1], found[2]


def adopted(script: Script, path: Path, arguments: argparse.Namespace) -> tuple[Draft, list[str]]:
    """The draft of the script's step and the lines of its file; raises KitError if the script holds none."""
    steps, others = find_steps(script)
    if not steps:
        raise KitError(f"{path} holds no command that preprocesses, converts or trains: {_hint(script)}")
    step = next((step for step in steps if step.kind == "train"), steps[0])
    draft = adopt(step, script, arguments.vendor, arguments.hf_model_path)
    for other in steps:
        if other is not step:
            draft.say(PROBLEM, f"line {other.command.line}, {other.program}: another command of a step ({other.kind}):"
                      " put it in a script of its own, and adopt that too")  # fmt: skip
    name = arguments.output.name if arguments.output else "my.env"
    return draft, settings_file(draft, script, others, path.name, name)


def _hint(script: Script) -> str:
    """What else the script does, or what could not be read."""
    for command in script.commands:
        if started := started_script(command):
            words = shlex.split(started)
            return f"it starts another script: adopt that one, with --args {shlex.quote(shlex.join(words[2:]))}"
    for line, text in script.unread:
        return f"line {line} was not read ({text}); give --args or --set"
    return "give the script that runs torchrun or python"


if __name__ == "__main__":
    errors.run(main)
