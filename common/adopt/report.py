"""The settings file: remarks as comments, then NAME=value lines, then what else the script held, and the counts."""

import re
import shlex
import textwrap
from collections.abc import Iterator, Sequence

from common.adopt.adoption import SCRIPTS
from common.adopt.command_line import started_script
from common.adopt.draft import CHANGED, HERE, PROBLEM, Draft, Remark
from common.adopt.shell import Command, Script
from common.adopt.table import read_table

WIDTH = 118
LIBRARIES = (
    "NCCL_", "MCCL_", "GLOO_", "NVTE_", "CUDA_", "TORCH_", "PYTORCH_", "HF_", "TRITON_", "UCX_", "OMP_", "MHA_", "MC",
    "MACA_", "WANDB_",
)  # fmt: skip
TITLES = {PROBLEM: "Problems: fix or accept each", CHANGED: "Changed in meaning", HERE: "Not needed here"}


def settings_file(draft: Draft, script: Script, others: Sequence[Command], name: str, output: str) -> list[str]:
    """The lines of the file; `name` is the old script, `output` what the user will call the file."""
    environment, plain = _assignments(draft, script)
    remarks = [*_commands(draft, others), *environment]
    for line, text in script.unread:
        remarks.append(
            Remark(PROBLEM, f"line {line}, not read: {text}: its flags and assignments are not in this file")
        )
    for variable in sorted(script.variables.unset & _used(draft, script)):
        remarks.append(Remark(CHANGED, f"{variable} is set by no line and was taken as unset: --set {variable}=VALUE if"
                              " your environment sets it"))  # fmt: skip
    draft.remarks += [remark for remark in remarks if remark not in draft.remarks]
    lines = [f"# From {name} by `python -m common.adopt`, which read it and ran nothing of it. To use it:",
             f"#   SETTINGS={shlex.quote(output)} bash {draft.vendor}/{SCRIPTS[draft.step.kind]}"]  # fmt: skip
    lines += [*_section(draft, PROBLEM), *_section(draft, CHANGED), "", *_settings(draft), *_section(draft, HERE)]
    lines += _list("Assignments that the above was made of, or that chose the branches read", plain)
    lines += _list("Branches of the script that its values do not take", [text for _, text in script.skipped])
    return [*lines, "#", f"# {summary(draft, script)}"]


def summary(draft: Draft, script: Script) -> str:
    """The counts, in one line."""
    kinds = [remark.kind for remark in draft.remarks]
    flags = len(draft.step.flags) + (len(draft.step.launcher) if draft.step.kind == "train" else 0)
    names = {each.name for each in script.assignments}
    return (
        f"{_count(flags, 'flag')} and {_count(len(names), 'assignment')}: {_count(len(draft.settings), 'setting')},"
        f" {_count(kinds.count(PROBLEM), 'problem')}, {kinds.count(CHANGED)} changed in meaning,"
        f" {kinds.count(HERE)} not needed here"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def problems(draft: Draft) -> list[str]:
    """The problems, numbered."""
    texts = [remark.text for remark in draft.remarks if remark.kind == PROBLEM]
    return [f"{number}. {text}" for number, text in enumerate(texts, 1)]


def _section(draft: Draft, kind: str) -> Iterator[str]:
    texts = problems(draft) if kind == PROBLEM else [each.text for each in draft.remarks if each.kind == kind]
    return iter(_list(TITLES[kind], texts))


def _list(title: str, texts: Sequence[str]) -> list[str]:
    if not texts:
        return []
    lines = ["#", f"# {title} ({len(texts)}):"]
    for text in texts:
        clean = re.sub(r"\s+", " ", text)
        start = "# " if re.match(r"[0-9]+\. ", clean) else "# - "
        lines += textwrap.wrap(clean, WIDTH, initial_indent=start, subsequent_indent="#   ", break_long_words=False,
                               break_on_hyphens=False)  # fmt: skip
    return lines


def _settings(draft: Draft) -> Iterator[str]:
    """NAME=value in the order of the script here."""
    for name in draft.defaults:
        if name in draft.settings:
            value, why = draft.settings[name]
            quote = '"' if re.search(r"[\s#'\\]", value) else "'" if '"' in value else ""
            yield f"{f'{name}={quote}{value}{quote}':<40} # {why}"


def _used(draft: Draft, script: Script) -> set[str]:
    return script.variables.origins({*draft.step.command.read, *script.chosen_by})


def _assignments(draft: Draft, script: Script) -> tuple[list[Remark], list[str]]:
    """(remarks on variables of libraries and on those that nothing reads, the others as NAME=value)."""
    used, rows = _used(draft, script), read_table()["environment"]
    remarks, plain = [], []
    for each in {each.name: each for each in script.assignments}.values():
        row, shown = rows.get(each.name), f"{each.name}={_short(each.value)}"
        if row and each.name not in used and (each.exported or row.rule == "here"):
            kind = CHANGED if row.rule == "keep" else HERE
            remarks.append(Remark(kind, f"{shown}: {row.text(each.value)}"))
        elif each.name in used:
            plain.append(shown)
        elif each.exported and each.name.startswith(LIBRARIES):
            remarks.append(
                Remark(CHANGED, f"{shown}: a library's variable: export it before the script if it is still wanted")
            )
        elif each.exported:
            remarks.append(Remark(PROBLEM, f"export {shown}: what reads it is not known here: export it before the"
                                  " script if something does"))  # fmt: skip
        else:
            remarks.append(Remark(HERE, f"{shown}: no flag of the command is made of it"))
    return remarks, plain


def _commands(draft: Draft, others: Sequence[Command]) -> Iterator[Remark]:
    """Remarks on the script's other commands."""
    quiet = []
    for command in others:
        text = _short(draft.variables.shown(shlex.join(command.words) if len(command.words) > 1 else command.words[0]))
        if started_script(command):
            yield Remark(PROBLEM, f"line {command.line}, {text}: another script is started, and was not read: run"
                         " `python -m common.adopt` on it, with its arguments as --args")  # fmt: skip
        elif command.words[0] in ("exit", "return", "exec"):
            yield Remark(
                PROBLEM, f"line {command.line}, {text}: the script ends here, and the lines below were not read"
            )
        else:
            quiet.append(f"line {command.line}: {text}")
    for text in quiet:
        yield Remark(HERE, f"{text}: a command that trains nothing")


def _short(text: str, limit: int = 70) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit]}..."
