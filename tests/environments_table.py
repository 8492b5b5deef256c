"""Writes docs/en/environments.md and docs/zh/environments.md: `python -m tests.environments_table`; a test compares.

What a cell says is what the kit's own checks of a run's settings say with the versions of that environment.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common.engine import pipeline_layers, transformer_engine
from common.engine.base import Engine
from common.engine.versions import ENGINES
from common.errors import KitError
from common.model.shape.config import QwenConfig
from common.platforms import PLATFORMS
from common.platforms.base import Platform
from common.training.planning import compatibility
from common.training.settings import TrainSettings
from tests.docker.images import MACA_2_27, MACA_3_5, MACA_3_8, NGC_24_03, NGC_25_06
from tests.recipes import write_config

ROOT = Path(__file__).parents[1]
LANGUAGES = ("en", "zh")
LOCK = ROOT / "requirements" / "nvidia-venv.txt"
ADDED = ("quack-kernels", "flash-attn-4")  # requirements/hopper.txt
FOUND = {"quack": "quack-kernels", "flash_attn": "flash-attn-4"}  # a module, and the package of the lock


@dataclass(frozen=True)
class Environment:
    """An image or a virtual environment: its names in both languages, platform and versions."""

    names: tuple[str, str]
    platform: Platform
    megatron: str
    packages: dict[str, str]

    @property
    def engine(self) -> Engine:
        """That of its megatron-core."""
        return next(each for each in ENGINES if each.release == self.megatron)

    @property
    def transformer_engine(self) -> tuple[int, int] | None:
        """Major and minor version, if it has one."""
        text = self.packages.get("transformer-engine")
        major, minor = text.split(".")[:2] if text else (0, 0)
        return (int(major), int(minor)) if text else None


def pins(path: Path) -> dict[str, str]:
    """The versions that a lock pins for Python 3.12."""
    lines = re.findall(r'^([\w.-]+)==([^ ;\n]+)(?: ; python_version >= "3\.1[12]")?$', path.read_text(), re.M)
    return dict(lines)


def environments() -> list[Environment]:
    """The columns of the table."""
    lock, cpu = pins(LOCK), pins(ROOT / "requirements" / "cpu.txt")
    nvidia, metax = PLATFORMS["nvidia"], PLATFORMS["metax"]
    return [
        Environment(("NGC 24.03", "NGC 24.03"), nvidia, "0.14.0", NGC_24_03),
        Environment(("NGC 25.06", "NGC 25.06"), nvidia, "0.19.2", NGC_25_06),
        Environment(("maca 2.27", "maca 2.27"), metax, "0.11.0", MACA_2_27),
        Environment(("MACA 3.5", "MACA 3.5"), metax, "0.16.1", MACA_3_5),
        Environment(("MACA 3.8", "MACA 3.8"), metax, "0.19.2", MACA_3_8),
        Environment(("`nvidia/setup.sh`", "`nvidia/setup.sh`"), nvidia, lock["megatron-core"], lock),
        Environment(("CPU", "CPU"), PLATFORMS["cpu"], cpu["megatron-core"], cpu),
    ]


WORDS = {"en": ("yes", "with", "no"), "zh": ("可以", "需", "不可以")}
BEFORE = {
    "en": """\
# What each image and environment can do

[中文](../zh/environments.md)

Written from the kit's own checks of a run's settings by `python -m tests.environments_table`: a cell says whether they
accept the setting with the versions of that environment. **None of the images was run on hardware**; the versions of
`nvidia/setup.sh` are those of [benchmarks.md](../benchmarks.md), the script was run without a GPU only. "with" names
what else must be set.
""",
    "zh": """\
# 各镜像和环境能做什么

[English](../en/environments.md)

由 `python -m tests.environments_table` 根据本套件自己对设置的检查生成：每格说明在该环境的版本下，检查是否接受这项设置。
**这些镜像都没有在硬件上运行过**；`nvidia/setup.sh` 的版本就是 [benchmarks.md](../benchmarks.md) 的版本，
脚本只在没有 GPU 的机器上运行过。“需”表示还要设置的内容。
""",
}
AFTER = {
    "en": """\
- NGC 24.03 is the base of `docker/nvidia.Dockerfile`, 25.06 a newer one: `--build-arg
  BASE_IMAGE=nvcr.io/nvidia/pytorch:25.06-py3 --build-arg MEGATRON_CORE=0.19.2`. maca 2.27 is that of
  `docker/metax.Dockerfile`, 3.5 and 3.8 are others that it names, with `requirements/metax-3.txt`. CPU is the lock
  `requirements/cpu.txt` on Python 3.12. The versions in NVIDIA's images are those of its documents, in MetaX's those of
  its documents and users (`tests/docker/images.py`).
- On MetaX the image decides: `TRANSFORMER_IMPL=transformer_engine` works where Transformer Engine is installed, as in
  some images of MACA 3.5 to 3.8 with torch 2.8 (2.8 and 2.13 exist; none for torch 2.10). Local
  layers are the default, since the kit never ran Transformer Engine's there. Of MetaX's GPUs only the C600 is said to
  have FP8.
- The GPU is not part of the table: FP8 and FlashAttention 4 are for Hopper and later GPUs, QuACK's products for Hopper.
  Without `-- --fused-products` and `-- --core-attention` both are used where a probe at the start shows that they work;
  the log says why one is not.
- `PACKING=auto`, the default of fine-tuning, is off where the table says no or "with", and for local layers on
  MetaX; the log says why. The recipes of fine-tuning have `PACKING=true`: on NGC 24.03 set `TRANSFORMER_IMPL=local`,
  or `PACKING=false`.
- torch_dist was never run on MetaX ([metax.md](../metax.md)), `OPTIMIZER_STATE=cpu` and `cpu_bf16` on a GPU
  for at most 60 steps.
  `CP` was run on two H200, with packed rows and local layers too ([long-rows.md](long-rows.md)).
- `TP_COMM_OVERLAP=auto`, the default, needs no Transformer Engine, but NVIDIA GPUs of one host, bf16 and PyTorch's
  symmetric memory (torch 2.6 or later, with its package cuda-bindings); the log says where it is not used.
""",
    "zh": """\
- NGC 24.03 是 `docker/nvidia.Dockerfile` 的基础镜像，25.06 是更新的一个：`--build-arg
  BASE_IMAGE=nvcr.io/nvidia/pytorch:25.06-py3 --build-arg MEGATRON_CORE=0.19.2`。maca 2.27 是
  `docker/metax.Dockerfile` 的基础镜像，3.5 和 3.8 是其中列出的另外两个，配 `requirements/metax-3.txt`；CPU 是
  Python 3.12 上的 `requirements/cpu.txt`。NVIDIA 镜像中的版本取自其文档，MetaX 的取自其文档和用户的记录
  （`tests/docker/images.py`）。
- 在 MetaX 上由镜像决定：装有 Transformer Engine 时可用 `TRANSFORMER_IMPL=transformer_engine`，例如 MACA 3.5 至 3.8 中
  带 torch 2.8 的部分镜像（有 2.8 和 2.13；torch 2.10 没有）。默认仍是 local 层：本套件没有在其上运行过
  Transformer Engine 的层。据称 MetaX 的 GPU 中只有 C600 支持 FP8。
- 表中不考虑 GPU 型号：FP8 和 FlashAttention 4 用于 Hopper 及更新的 GPU，QuACK 的矩阵乘用于 Hopper。不设
  `-- --fused-products` 和 `-- --core-attention` 时，启动时试运行，能工作的就使用；日志说明没有使用的原因。
- 微调的默认值 `PACKING=auto` 在表中为“不可以”或“需”时关闭，沐曦上的 local 层也关闭；日志说明原因。
  微调的配方含 `PACKING=true`：在 NGC 24.03 上请设 `TRANSFORMER_IMPL=local`，或 `PACKING=false`。
- torch_dist 没有在 MetaX 上运行过（[metax.md](../metax.md)），`OPTIMIZER_STATE=cpu` 和 `cpu_bf16`
  在 GPU 上最多运行过 60 步。
  `CP` 在两块 H200 上运行过，包括拼接的行和 local 层（[long-rows.md](long-rows.md)）。
- 默认的 `TP_COMM_OVERLAP=auto` 不需要 Transformer Engine，但需要同一主机的 NVIDIA GPU、bf16 和 PyTorch 的对称内存
  （torch 2.6 或更新，以及其 cuda-bindings 包）；不使用时日志会说明原因。
""",
}
# Setting, and the fields that select it in a run of two processes.
ROWS: dict[str, dict[str, Any]] = {
    "PACKING=true": {"train_mode": "finetune", "packing": True},
    "RESET_ATTENTION=true": {"reset_attention": True},
    "CP=2": {"cp": 2},
    "CP=2 PACKING=true": {"cp": 2, "train_mode": "finetune", "packing": True},
    "FP8_FORMAT=hybrid FP8_RECIPE=delayed": {"fp8_format": "hybrid", "fp8_recipe": "delayed"},
    "FP8_FORMAT=hybrid FP8_RECIPE=tensorwise": {"fp8_format": "hybrid", "fp8_recipe": "tensorwise"},
    "FP8_FORMAT=hybrid FP8_RECIPE=blockwise": {"fp8_format": "hybrid", "fp8_recipe": "blockwise"},
    "OPTIMIZER_STATE=bf16": {"optimizer_state": "bf16"},
    "OPTIMIZER_STATE=cpu": {"optimizer_state": "cpu"},
    "OPTIMIZER_STATE=cpu_bf16": {"optimizer_state": "cpu_bf16"},
    "TP_COMM_OVERLAP=true": {"tp": 2, "tp_comm_overlap": "true"},
    "ASYNC_SAVE=true": {"async_save": True},
    "DETERMINISTIC=true": {"deterministic": True},
    "PIPELINE_LAYERS=7,7,8,6": {"gpus": 4, "pp": 4, "pipeline_layers": "7,7,8,6"},
    "-- --fused-products true": {"fused_products": "true"},
    "-- --core-attention flash_attn_4": {"core_attention": "flash_attn_4"},
}
# What makes a setting work where it does not by itself, in the order in which it is tried.
REMEDIES: dict[str, dict[str, Any]] = {
    "": {},
    "TRANSFORMER_IMPL=local": {"transformer_impl": "local"},
    "CKPT_FORMAT=torch_dist": {"ckpt_format": "torch_dist"},
    "TRANSFORMER_IMPL=transformer_engine": {"transformer_impl": "transformer_engine"},
}


@contextmanager
def installed(environment: Environment) -> Iterator[None]:
    """Within it the checks see the packages of `environment`."""

    def find(module: str) -> object | None:
        return environment.packages.get(FOUND.get(module, module))

    with ExitStack() as stack:
        for module in (transformer_engine, pipeline_layers, compatibility):
            stack.enter_context(patch.object(module, "installed_engine", lambda: environment.engine))
        stack.enter_context(
            patch.object(transformer_engine, "transformer_engine_version", lambda: environment.transformer_engine)
        )
        stack.enter_context(patch.object(compatibility, "find_spec", find))
        yield


def accepts(environment: Environment, fields: dict[str, Any], qwen: QwenConfig) -> bool:
    """Whether the checks of a run accept these settings there."""
    settings = TrainSettings(
        **{"save_checkpoint_path": "-", "dataset_path": "-", "train_iters": 1, "gpus": 2, **fields}
    )
    with installed(environment):
        try:
            compatibility.check_fit(settings, environment.platform, qwen)
            compatibility.check_packages(settings, environment.platform)
        except KitError:
            return False
    return True


def cell(environment: Environment, fields: dict[str, Any], qwen: QwenConfig, language: str) -> str:
    """Yes, the setting that it takes besides, or no."""
    yes, besides, no = WORDS[language]
    for remedy, more in REMEDIES.items():
        if accepts(environment, fields | more, qwen):
            return f"{besides} `{remedy}`" if remedy else yes
    return no


def facts(environment: Environment) -> dict[str, str]:
    """Its versions and the platform's defaults."""
    platform, packages = environment.platform, environment.packages
    return {
        "torch": packages["torch"].split("+")[0],
        "megatron-core": environment.megatron,
        "Transformer Engine": packages.get("transformer-engine", "—").split("+")[0],
        "`TRANSFORMER_IMPL`": f"`{platform.transformer_impl}`",
        "`CKPT_FORMAT`": f"`{platform.checkpoint_format}`",
        "`requirements/hopper.txt`": "✓" if all(name in packages for name in ADDED) else "—",
    }


def page(language: str) -> str:
    """The page in that language."""
    columns = environments()
    with tempfile.TemporaryDirectory() as scratch:
        qwen = write_config(Path(scratch), "7B")  # 28 layers, as PIPELINE_LAYERS of the table
        rows = [
            [f"`{name}`", *(cell(each, fields, qwen, language) for each in columns)] for name, fields in ROWS.items()
        ]
    of_columns = [facts(each) for each in columns]
    head = ["", *(each.names[LANGUAGES.index(language)] for each in columns)]
    above = [[name, *(each[name] for each in of_columns)] for name in of_columns[0]]
    lines = [head, ["---"] * len(head), *above, *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{BEFORE[language]}\n{table}\n\n{AFTER[language]}"


if __name__ == "__main__":
    for each in LANGUAGES:
        (ROOT / "docs" / each / "environments.md").write_text(page(each), encoding="utf-8")
