"""Step 5: `python -m common.evaluate` measures an exported model on held-out rows and choice tasks."""

import argparse
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from common import errors, log
from common.data.encoders.encoded import DROPPED
from common.evaluate.loss import loss_of
from common.evaluate.report import RowScore, results_json, table
from common.evaluate.samples import read_row_sets
from common.evaluate.settings import EvaluateSettings
from common.evaluate.tasks import TaskScore, find_tasks, run_tasks
from common.files import write_json
from common.inference.model import find_device, load_model
from common.inference.model_folder import open_model_folder
from common.inference.output import check_new_file
from common.log import logger
from common.settings import add_options, check_environment, from_namespace

PACKAGES = ("torch", "transformers", "lm-eval")


def evaluate(settings: EvaluateSettings, check: bool) -> None:
    """Prints the table and writes OUTPUT; `check`: only check that the model, the rows and the tasks are there."""
    folder = open_model_folder(Path(settings.hf_model_path))
    find_device(settings.device)
    output = Path(settings.output) if settings.output else None
    if output:
        check_new_file(output)
    tasks = find_tasks(settings) if settings.tasks else None
    row_sets = read_row_sets(settings, folder.tokenizer, folder.qwen.longest_sequence) if settings.input else []
    if check:
        windows = sum(len(row_set.windows) for row_set in row_sets)
        print(f"ok: {folder.path} can be evaluated on {windows} windows and {len(tasks.names) if tasks else 0} tasks")
        return
    model = load_model(folder, settings)
    scores = []
    for row_set in row_sets:
        scores.append(RowScore(row_set, loss_of(model, row_set.windows, settings.batch_size)))
        logger.info("%s: loss %.6f", row_set.name, scores[-1].loss.mean)
    task_scores: list[TaskScore] = []
    if tasks:
        task_scores = run_tasks(tasks, settings, folder, model, settings.batch_size)
    print("\n".join(map(errors.visible, table(scores, task_scores))))
    for row_set in row_sets:
        for what, number in row_set.counts.items():
            if number and what.startswith((DROPPED, "truncated")):
                logger.warning("%s: %d rows %s", row_set.name, number, what)
    if output:
        described = {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
        content = {**described, "versions": _versions(), "settings": asdict(settings)}
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, {**content, **results_json(scores, task_scores)})
        logger.info("written: %s", output)


def _versions() -> dict[str, str]:
    installed = {found.metadata["Name"].lower().replace("_", "-"): found.version for found in metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m common.evaluate", description=EvaluateSettings.__doc__)
    add_options(parser, EvaluateSettings)
    parser.add_argument("--check", action="store_true", help="check the model, the rows and the tasks, and stop")
    arguments = parser.parse_args()
    log.setup()
    log.quiet_libraries()
    settings = from_namespace(EvaluateSettings, arguments)
    check_environment(settings)
    evaluate(settings, arguments.check)


if __name__ == "__main__":
    errors.run(main)
