"""Writes docs/en/settings.md and docs/zh/settings.md: `python -m tests.settings_table`; a test compares.

Names, defaults and effects come from the scripts; types and choices from the settings' dataclasses. MEGATRON alone is
kept by hand.
"""

import dataclasses
import re
import typing
from dataclasses import dataclass
from pathlib import Path

from common.chat.settings import ChatSettings
from common.checkpoint.conversion.hf_to_megatron import HfToMegatron
from common.checkpoint.conversion.megatron_to_hf import MegatronToHf
from common.data.preprocessing.settings import PretrainSettings, SftSettings
from common.evaluate.settings import EvaluateSettings
from common.settings import kind_name
from common.training.settings import TrainSettings

ROOT = Path(__file__).parents[1]
LANGUAGES = ("en", "zh")
VENDORS = ("nvidia", "metax", "cpu")
STEPS: dict[str, tuple[type, ...]] = {
    "1_preprocess_pretrain.sh": (PretrainSettings,),
    "1_preprocess_sft.sh": (SftSettings,),
    "2_convert_between_hf_megatron.sh": (HfToMegatron, MegatronToHf),
    "3_run_mcore_qwen.sh": (TrainSettings,),
    "4_chat.sh": (ChatSettings,),
    "5_evaluate.sh": (EvaluateSettings,),
}
SUBCOMMAND = "CONVERT_TYPE"  # which command of step 2 runs: no flag
CONVERSIONS = "huggingface-to-megatron, megatron-to-huggingface"
LINE = re.compile(r'^: "\$\{([A-Z0-9_]+):=([^}]*)\}" +# (.*)$')

# Megatron-LM's own flags, checked by hand on 2026-11-29: for step 1 in its tools/preprocess_data.py (commit 00736f4),
# for step 3 in megatron/training of the wheel megatron-core 0.19.2 (arguments.py, and the config classes that it makes
# flags of). A name alone: the same values mean the same.
PREPROCESS = {
    "INPUT": "--input", "OUTPUT_PREFIX": "--output-prefix", "TOKENIZER_PATH": "--tokenizer-model",
    "JSON_KEY": "--json-keys", "APPEND_EOD": "--append-eod", "WORKERS": "--workers",
}  # fmt: skip
TRAIN = {
    "DATASET_PATH": "--data-path", "VALID_DATASET_PATH": "--valid-data-path", "SPLIT": "--split",
    "SEQ_LENGTH": "--seq-length", "RESET_ATTENTION": "--reset-attention-mask",
    "LOAD_CHECKPOINT_PATH": "--load", "SAVE_CHECKPOINT_PATH": "--save",
    "TP": "--tensor-model-parallel-size", "PP": "--pipeline-model-parallel-size",
    "VPP": "--num-virtual-stages-per-pipeline-rank", "PIPELINE_LAYERS": "--pipeline-model-parallel-layout",
    "CP": "--context-parallel-size", "DISTRIBUTED_TIMEOUT_MIN": "--distributed-timeout-minutes",
    "MICRO_BATCH_SIZE": "--micro-batch-size", "GLOBAL_BATCH_SIZE": "--global-batch-size",
    "TRAIN_ITERS": "--train-iters", "EXIT_INTERVAL": "--exit-interval", "EXIT_DURATION_MIN": "--exit-duration-in-mins",
    "SEED": "--seed", "PRECISION": "--bf16", "LR": "--lr", "MIN_LR": "--min-lr",
    "OPTIMIZER_STATE": "--use-precision-aware-optimizer, --optimizer-cpu-offload",
    "LR_WARMUP_ITERS": "--lr-warmup-iters", "LR_WARMUP_FRACTION": "--lr-warmup-fraction",
    "LR_DECAY_STYLE": "--lr-decay-style", "LR_WSD_DECAY_ITERS": "--lr-wsd-decay-iters",
    "LR_WSD_DECAY_STYLE": "--lr-wsd-decay-style", "WEIGHT_DECAY": "--weight-decay", "ADAM_BETA1": "--adam-beta1",
    "ADAM_BETA2": "--adam-beta2", "ADAM_EPS": "--adam-eps", "CLIP_GRAD": "--clip-grad",
    "SAVE_INTERVAL": "--save-interval", "SAVE_OPTIMIZER": "--no-save-optim", "ASYNC_SAVE": "--async-save",
    "CKPT_FORMAT": "--ckpt-format", "TRAIN_OR_CONVERT_CKPT": "--ckpt-convert-format",
    "EVAL_INTERVAL": "--eval-interval", "EVAL_ITERS": "--eval-iters", "LOG_INTERVAL": "--log-interval",
    "RECOMPUTE": "--recompute-granularity", "RECOMPUTE_NUM_LAYERS": "--recompute-num-layers",
    "FP8_FORMAT": "--fp8-format", "FP8_RECIPE": "--fp8-recipe", "TP_COMM_OVERLAP": "--tp-comm-overlap",
    "TRANSFORMER_IMPL": "--transformer-impl", "OVERLAP_GRAD_REDUCE": "--overlap-grad-reduce",
    "OVERLAP_PARAM_GATHER": "--overlap-param-gather", "DETERMINISTIC": "--deterministic-mode",
    "TENSORBOARD": "--tensorboard-dir", "WANDB_PROJECT": "--wandb-project", "WANDB_EXP_NAME": "--wandb-exp-name",
    "WANDB_SAVE_PATH": "--wandb-save-dir",
}  # fmt: skip
MEGATRON = {"1_preprocess_pretrain.sh": PREPROCESS, "3_run_mcore_qwen.sh": TRAIN}

INTRODUCTION = {
    "en": """\
# Settings

[中文](../zh/settings.md)

Every setting of every script. Set one in the environment, in a file (`SETTINGS=my.env`), or at the top of a script;
`--help` of a script prints the same. The flag is Python's, which a script passes on; more flags go after `--`. Written
from the code by `python -m tests.settings_table`.

- **default**: that of `nvidia/`; `metax/` and `cpu/` are named where theirs differs. Without one, a setting is needed,
  or off, or as its effect says.
- **values**: `N` is a whole number, `X` a number, `TEXT` a text or path.
- **Megatron-LM**: its own name for it, if it has one. Its values may differ in form. Source: `tools/preprocess_data.py`
  at commit 00736f4 for step 1, `megatron/training` of the wheel megatron-core 0.19.2 for step 3.
""",
    "zh": """\
# 设置

[English](../en/settings.md)

全部脚本的全部设置。可以在环境变量、文件（`SETTINGS=my.env`）或脚本开头设置；脚本的 `--help` 打印同样的内容。
参数是 Python 的，由脚本传递；更多参数写在 `--` 之后。本页由 `python -m tests.settings_table` 根据代码生成。

- **默认值**：`nvidia/` 的；`metax/` 和 `cpu/` 不同时注明。没有默认值的设置是必填的，或关闭，或如其作用所述。
- **取值**：`N` 为整数，`X` 为数，`TEXT` 为文本或路径。
- **Megatron-LM**：它自己的名称（如果有）。取值的形式可能不同。来源：第 1 步为提交 00736f4 的
  `tools/preprocess_data.py`，第 3 步为 megatron-core 0.19.2 安装包中的 `megatron/training`。
""",
}
COLUMNS = {
    "en": "| setting | default | values | effect | flag | Megatron-LM |",
    "zh": "| 设置 | 默认值 | 取值 | 作用 | 参数 | Megatron-LM |",
}
MACHINE_COLUMNS = {"en": "| setting | default | declared in | effect |", "zh": "| 设置 | 默认值 | 声明于 | 作用 |"}
MACHINE = {"en": "Of the machine and of every step", "zh": "本机，以及所有步骤通用"}


@dataclass(frozen=True)
class Setting:
    """A line `: "${NAME:=default}" # English / 中文` of a script, under its heading."""

    name: str
    default: str
    effect: str
    heading: str


def read(path: Path) -> list[Setting]:
    """The settings that a script declares, in its order."""
    found, heading = [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := LINE.match(line):
            found.append(Setting(match[1], match[2], match[3], heading))
        elif line.startswith("# "):
            heading = line[2:]
    return found


def side(text: str, language: str) -> str:
    """The English or the Chinese of `English / 中文`; where one text serves both languages, that."""
    english, _, chinese = text.partition(" / ")
    return english if language == "en" or not chinese else chinese


def defaults(name: str, of_vendors: dict[str, list[Setting]]) -> str:
    """nvidia's default, and those that differ from it."""
    by_vendor = {vendor: {each.name: each.default for each in found}[name] for vendor, found in of_vendors.items()}
    first = by_vendor["nvidia"]
    shown = [f"`{first}`" if first else "—" * any(by_vendor.values())]
    shown += [f"{vendor} `{value}`" for vendor, value in by_vendor.items() if value != first]
    return "; ".join(shown)


def values(name: str, settings: tuple[type, ...]) -> str:
    """The choices of a setting, or its kind as `--help` of the command shows it."""
    if name == SUBCOMMAND:
        return CONVERSIONS
    for each in settings:
        fields = {field.name: field for field in dataclasses.fields(each)}
        if field := fields.get(name.lower()):
            kind = typing.get_type_hints(each)[field.name]
            return ", ".join(field.metadata.get("choices") or [kind_name(kind)])
    raise KeyError(name)


def row(cells: list[str]) -> str:
    """A row of a table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(script: str, language: str) -> list[str]:
    """The lines of a script's part of the page."""
    of_vendors = {vendor: read(ROOT / vendor / script) for vendor in VENDORS}
    lines, heading = [f"## {script}"], None
    for setting in of_vendors["nvidia"]:
        if setting.heading != heading:
            heading = setting.heading
            lines += ["", f"**{side(heading, language)}**", "", COLUMNS[language], "|---|---|---|---|---|---|"]
        name = setting.name
        flag = "" if name == SUBCOMMAND else f"`--{name.lower().replace('_', '-')}`"
        megatron = MEGATRON.get(script, {}).get(name, "")
        lines.append(
            row([
                f"`{name}`", defaults(name, of_vendors), values(name, STEPS[script]), side(setting.effect, language),
                flag, ", ".join(f"`{each}`" for each in megatron.split(", ") if each),
            ])
        )  # fmt: skip
    return lines


def machine(language: str) -> list[str]:
    """The lines of what is set for the machine and for every step."""
    lines = [f"## {MACHINE[language]}", "", MACHINE_COLUMNS[language], "|---|---|---|---|"]
    shared = {"common/shell/lib.sh": read(ROOT / "common" / "shell" / "lib.sh")}
    files = shared | {f"{vendor}/env.sh": read(ROOT / vendor / "env.sh") for vendor in VENDORS}
    for file, found in files.items():
        for each in found:
            default = f"`{each.default}`" if each.default else ""
            lines.append(row([f"`{each.name}`", default, f"`{file}`", side(each.effect, language)]))
    return lines


def page(language: str) -> str:
    """The page in that language."""
    parts = [[INTRODUCTION[language].rstrip()], *(table(script, language) for script in STEPS), machine(language)]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


if __name__ == "__main__":
    for language in LANGUAGES:
        (ROOT / "docs" / language / "settings.md").write_text(page(language), encoding="utf-8")
