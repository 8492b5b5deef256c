"""`python -m common.estimate`: memory of a GPU by layout, which layouts fit, tokens/s and days. Needs no GPU."""

import argparse
import json
from pathlib import Path

from common import errors
from common.estimate.gpus import find_gpu
from common.estimate.layouts import EstimateSettings, estimate_all
from common.estimate.report import as_values, report
from common.model.shape.config import load_config
from common.settings import add_options, from_namespace


def main() -> None:
    """Prints the table, or JSON; exits 2 where the GPU is not known or every layout is refused."""
    parser = argparse.ArgumentParser(prog="python -m common.estimate", description=__doc__)
    add_options(parser, EstimateSettings)
    parser.add_argument("--json", action="store_true", help="print everything as JSON, in bytes, every layout")
    arguments = parser.parse_args()
    asked = from_namespace(EstimateSettings, arguments)
    gpu = find_gpu(asked.gpu, asked.memory_gib)
    qwen = load_config(Path(asked.hf_model_path))
    found, refused = estimate_all(asked, qwen, gpu)
    if arguments.json:
        print(json.dumps(as_values(asked, qwen, gpu, found, refused), indent=1))
    else:
        print(*report(asked, qwen, gpu, found, refused), sep="\n")


if __name__ == "__main__":
    errors.run(main)
