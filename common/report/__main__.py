"""`python -m common.report RUN [RUN ...]`: one HTML page on runs, from the records in their SAVE_CHECKPOINT_PATH."""

import argparse
from pathlib import Path

from common import errors
from common.errors import writing
from common.report.page import page
from common.report.plots import as_svg, write_png
from common.report.runs import read_reference, read_run, read_samples


def main() -> None:
    """Writes the page and, if wanted, the curves as PNG; exits 2 where a folder holds no metrics."""
    parser = argparse.ArgumentParser(prog="python -m common.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's SAVE_CHECKPOINT_PATH")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page (default: %(default)s)")
    parser.add_argument(
        "--samples", type=Path, help='answers to show: what 4_chat.sh wrote to OUTPUT, rows with an "output"'
    )
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="NAME=LOSS",
        help="draw a loss as a line",
    )
    parser.add_argument("--png", type=Path, help="also write the curves to this file")
    arguments = parser.parse_args()
    runs = [read_run(folder) for folder in arguments.runs]
    references = dict(read_reference(each) for each in arguments.reference)
    samples = read_samples(arguments.samples) if arguments.samples else []
    text = page(runs, as_svg(runs, references), samples)
    with writing(arguments.output):
        arguments.output.write_text(text, encoding="utf-8")
    if arguments.png:
        write_png(runs, arguments.png, references)
    print(f"ok: {arguments.output}")


if __name__ == "__main__":
    errors.run(main)
