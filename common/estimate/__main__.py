"""`python -m common.estimate`: memory per GPU of each layout, which layouts fit, tokens/s and days. Needs no GPU."""

import argparse
import json
from pathlib import Path

from common import errors
from common.errors import writing
from common.estimate.gpus import find_gpu
from common.estimate.layouts import EstimateSettings, estimate_all
from common.estimate.report import as_values, report
from common.estimate.settings_file import settings_lines
from common.model.shape.config import load_config
from common.settings import add_options, from_namespace


def main() -> None:
    """Prints the table, or JSON; exits 2 if the GPU is unknown or every layout is refused."""
    parser = argparse.ArgumentParser(prog="python -m common.estimate", description=__doc__)
    add_options(parser, EstimateSettings)
    parser.add_argument("--json", action="store_true", help="print all layouts as JSON, with memory in bytes")
    parser.add_argument(
        "--write-settings", type=Path, metavar="FILE", help="also write the first layout for SETTINGS=FILE of step 3"
    )
    arguments = parser.parse_args()
    settings = from_namespace(EstimateSettings, arguments)
    gpu = find_gpu(settings.gpu, settings.memory_gib)
    qwen = load_config(Path(settings.hf_model_path))
    found, refused = estimate_all(settings, qwen, gpu)
    if arguments.write_settings:
        with writing(arguments.write_settings):
            arguments.write_settings.write_text("".join(f"{line}\n" for line in settings_lines(found[0], gpu)))
    if arguments.json:
        print(json.dumps(as_values(settings, qwen, gpu, found, refused), indent=1))
    else:
        print(*report(settings, qwen, gpu, found, refused), sep="\n")


if __name__ == "__main__":
    errors.run(main)
