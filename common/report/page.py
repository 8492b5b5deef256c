"""The report as one HTML file that needs nothing else: no script, no font, no network."""

from collections.abc import Iterable
from html import escape
from typing import Any

from common.report.runs import KILLED, UNKNOWN_END, Run, different_settings, one_line_reason, summary

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", sans-serif; color: #1f2937; margin: 0 auto;
  max-width: 62rem; padding: 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.subtitle { color: #6b7280; margin-top: 0.2rem; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.6rem; }
.card { border: 1px solid #e5e7eb; border-radius: 0.5rem; padding: 0.5rem 0.8rem; overflow-wrap: anywhere; }
.card small { color: #6b7280; display: block; }
.sample { margin-bottom: 0.6rem; } pre { white-space: pre-wrap; margin: 0 0 0.4rem; font-size: 0.85rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0.6rem; }
.curves svg { width: 100%; height: auto; }
.curves svg:first-child { grid-column: 1 / -1; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
td, th { border-bottom: 1px solid #e5e7eb; padding: 0.25rem 0.8rem 0.25rem 0; text-align: left; vertical-align: top; }
details { margin-top: 1rem; } summary { cursor: pointer; font-weight: 600; }
"""


def page(runs: list[Run], curves: list[str], samples: list[dict[str, Any]]) -> str:
    """The HTML text: what each run reached, its curves, sample answers, its data, its starts, and the settings."""
    title = ", ".join(run.name for run in runs)
    sections = [section for run in runs for section in _summary(run, len(runs) > 1)]
    sections += ["<h2>Curves</h2>", f'<div class="curves">{"".join(curves)}</div>']
    if len(runs) > 1:
        rows = [[name, *values] for name, values in different_settings(runs).items()]
        sections += ["<h2>Settings that differ</h2>", _table(["setting", *(run.name for run in runs)], rows)]
    if samples:
        sections += ["<h2>Sample answers</h2>", _samples(samples)]
    for run in runs:
        sections += _data(run, len(runs) > 1)
        sections += [f"<h2>Starts of {escape(run.name)}</h2>" if len(runs) > 1 else "<h2>Starts</h2>", _starts(run)]
        sections += [_details(run, each) for each in run.starts[-1:]]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _summary(run: Run, named: bool) -> Iterable[str]:
    if named:
        yield f"<h2>{escape(run.name)}</h2>"
    if run.starts:
        last = run.starts[-1]
        sizes = ", ".join(f"{name.upper()} {size}" for name, size in last["parallel"].items() if size > 1)
        device = f"{last['world_size']} x {last['device']['name']}"
        subtitle = " · ".join(filter(None, (device, sizes, last["settings"]["precision"])))
        yield f'<p class="subtitle">{escape(subtitle)}</p>'
    cards = "".join(
        f'<div class="card"><small>{escape(name)}</small>{escape(value)}</div>' for name, value in summary(run).items()
    )
    yield f'<div class="cards">{cards}</div>'


def _starts(run: Run) -> str:
    rows = []
    for start in run.starts:
        end = start.get("end") or {}
        reason = one_line_reason(end) if end else UNKNOWN_END if start is run.starts[-1] else KILLED
        began = f"{start['start']['kind']} from {start['start']['from']}"
        rows.append([start["time"], start["iteration"], began, end.get("time", ""), end.get("iteration", ""), reason])
    return _table(["began", "at iteration", "with", "ended", "at iteration", "because"], rows)


def _data(run: Run, named: bool) -> list[str]:
    datasets = run.starts[-1].get("datasets", []) if run.starts else []
    if not datasets:
        return []
    heads = list(datasets[0])
    rows = [[f"{value:,}" if isinstance(value, int) else value for value in each.values()] for each in datasets]
    return [f"<h2>Data of {escape(run.name)}</h2>" if named else "<h2>Data</h2>", _table(heads, rows)]


def _samples(samples: list[dict[str, Any]]) -> str:
    """The fields of each row but its counts, as they are."""
    shown = [[(name, value) for name, value in row.items() if isinstance(value, str)] for row in samples]
    return "".join(
        '<div class="card sample">'
        + "".join(f"<small>{escape(name)}</small><pre>{escape(value)}</pre>" for name, value in row)
        + "</div>"
        for row in shown
    )


def _details(run: Run, start: dict[str, Any]) -> str:
    facts = {"command": start["command"], "kit": start["kit"], "device": start["device"], "data": start["data"]}
    rows = [[name, value] for name, value in {**facts, **start["versions"], **start["settings"]}.items()]
    table = _table(["name", "value"], rows)
    return f"<details><summary>Settings and versions of the last start</summary>{table}</details>"


def _table(heads: list[str], rows: list[list[Any]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
