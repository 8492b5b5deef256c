"""Choice and other tasks, run by lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness)."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.errors import KitError
from common.evaluate.settings import TaskSettings
from common.inference.model_folder import ModelFolder

REQUIREMENTS = "requirements/eval.txt"


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task; the standard error is None where the harness gives none."""

    task: str
    num_fewshot: int
    samples: int
    metric: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class Tasks:
    """The names of tasks that exist, and the harness's index of them."""

    names: list[str]
    manager: Any


def find_tasks(settings: TaskSettings) -> Tasks:
    """The tasks of TASKS; raises KitError where one does not exist, or the harness is not installed."""
    assert settings.tasks
    if find_spec("lm_eval") is None:
        raise KitError(
            f"TASKS={settings.tasks} needs lm-evaluation-harness, which is not installed:"
            f" {sys.executable} -m pip install -r {REQUIREMENTS}; or leave TASKS empty"
        )
    if settings.tasks_path and not Path(settings.tasks_path).is_dir():
        raise KitError(f"TASKS_PATH={settings.tasks_path} is not a folder: give the folder of your .yaml files")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=settings.tasks_path)
    names = [name for name in settings.tasks.replace(",", " ").split() if name]
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        own = f", nor in {settings.tasks_path}" if settings.tasks_path else "; TASKS_PATH names a folder of your own"
        raise KitError(f"TASKS: {', '.join(unknown)} is no task of lm-evaluation-harness{own}: correct the name")
    return Tasks(names, manager)


def run_tasks(
    tasks: Tasks, settings: TaskSettings, folder: ModelFolder, model: Any, batch_size: int
) -> list[TaskScore]:
    """The scores of the loaded `model` in `tasks`; raises KitError where their data cannot be loaded."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    wrapped = HFLM(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size,
        max_length=folder.qwen.longest_sequence, device=str(model.device),
    )  # fmt: skip
    try:
        found = simple_evaluate(
            model=wrapped,
            tasks=tasks.manager.match_tasks(tasks.names),
            num_fewshot=settings.num_fewshot,
            task_manager=tasks.manager,
            apply_chat_template=settings.apply_chat_template,
            log_samples=False,
        )
    except OSError as error:  # those of datasets and of the hub are among them
        raise KitError(
            f"TASKS={settings.tasks}: {type(error).__name__}: {str(error)[:500]}: see the messages above; without a"
            " network a task's data set must be in datasets' cache, or a file that your own task names"
        ) from error
    assert found
    return list(_scores(found))


def _scores(found: Any) -> Iterator[TaskScore]:
    """The metrics of each task in what `simple_evaluate` returns, under the names `acc` or `acc,FILTER`."""
    for task, values in found["results"].items():
        for name, value in values.items():
            metric, _, chosen = name.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{chosen}")
            shown = metric if chosen == "none" else name
            number = found["n-samples"].get(task, {}).get("effective", 0)
            shots = int(found["n-shot"].get(task, 0))
            yield TaskScore(task, shots, number, shown, float(value), stderr if isinstance(stderr, float) else None)
