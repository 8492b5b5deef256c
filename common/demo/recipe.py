"""The steps of the quickstart: for the sample data, or for the user's own model and data."""

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from common.checkpoint.formats.checkpoint_paths import find_checkpoint
from common.checkpoint.formats.model_files import model_files
from common.data.sources.discovery import find_inputs
from common.demo.answers import ANSWERS, kind_of
from common.demo.corpus import CHATS, NUM_QUESTIONS, QUESTIONS, TEXTS
from common.demo.steps import KIT, Step, shown
from common.errors import KitError
from common.settings import option

SHOWN_ROWS = 3
FOR_OWN = ("roles", "seq_length", "truncate", "epochs", "global_batch_size", "micro_batch_size", "lr")
TITLES = {
    "sample": "A tiny Qwen2.5 with random weights, and sample data / 随机权重的微型 Qwen2.5 和示例数据",
    "tokens_pretrain": "Texts to tokens, in Megatron's .bin and .idx / 文本转换为 token",
    "tokens_finetune": "Conversations to tokens, with what is learned of them / 对话转换为 token 和损失掩码",
    "megatron": "The Hugging Face model to a Megatron checkpoint / Hugging Face 模型转换为 Megatron 检查点",
    "pretrain": "Pretraining: every token of the texts is learned / 预训练",
    "finetune": "Fine-tuning: the answers are learned / 微调",
    "torch": "The distributed checkpoint to torch format, a file a process / 分布式检查点转换为 torch 格式",
    "huggingface": "The trained weights to a Hugging Face folder / 训练好的权重转换为 Hugging Face 目录",
    "answers": "Questions to the model before and after, by transformers / 用 transformers 向训练前后的模型提问",
}
# Enough for the sample's small model to learn the sample data, with a margin (tests/end_to_end runs it).
SAMPLE = {
    "SEQ_LENGTH": "128",
    "MICRO_BATCH_SIZE": "32",
    "GLOBAL_BATCH_SIZE": "32",
    "LR_WARMUP_ITERS": "20",
    "ADAM_BETA2": "0.98",
    "WEIGHT_DECAY": "0.1",
    "SAVE_INTERVAL": "250",
    "EVAL_INTERVAL": "250",
    "LOG_INTERVAL": "50",
}
SAMPLE_STAGE = {
    "pretrain": {"TRAIN_ITERS": "500", "LR": "6e-3", "MIN_LR": "6e-4", "RESET_ATTENTION": "true"},
    "finetune": {"TRAIN_ITERS": "150", "LR": "4e-3", "MIN_LR": "4e-4", "PACKING": "true"},
}


@dataclass(frozen=True)
class QuickstartSettings:
    """All steps: data, conversion, training, conversion back, answers."""

    work_dir: str | None = option(None, "folder for all output; default: work in the kit's folder")
    hf_model_path: str | None = option(None, "your own model, a Hugging Face folder; requires INPUT", hub="model")
    input: str | None = option(None, "your own rows, conversations or text; requires HF_MODEL_PATH")
    roles: str = option("system", "your data: instruction is the system turn; or alpaca", ("system", "alpaca"))
    seq_length: int = option(1024, "your data: tokens in a sample")
    truncate: str = option("right", "your data: conversations over SEQ_LENGTH", ("error", "drop", "left", "right"))
    epochs: float = option(1.0, "your data: number of epochs")
    global_batch_size: int = option(8, "your data: samples per step")
    micro_batch_size: int = option(1, "your data: samples per process and forward pass")
    lr: float = option(1e-5, "your data: maximum learning rate")
    tp: int = option(2, "tensor parallel size")
    gpus: int = option(2, "number of processes")
    seed: int = option(1, "seed of the sample, its model's weights and the order of samples")

    def __post_init__(self) -> None:
        if bool(self.hf_model_path) != bool(self.input):
            raise KitError(
                f"HF_MODEL_PATH={self.hf_model_path or ''} and INPUT={self.input or ''}: set both, for your own model"
                " and data, or neither, for the sample"
            )
        changed = [
            each.name for each in fields(self) if each.name in FOR_OWN and getattr(self, each.name) != each.default
        ]
        if changed and not self.input:
            raise KitError(
                f"{changed[0].upper()}={getattr(self, changed[0])} is for your own data: set HF_MODEL_PATH and"
                " INPUT too, or leave it out"
            )


def work_dir(settings: QuickstartSettings) -> Path:
    """WORK_DIR as an absolute path; raises KitError if the folder holds other files."""
    folder = Path(settings.work_dir).absolute() if settings.work_dir else KIT / "work"
    if folder.exists() and not (folder / "steps").is_dir() and (not folder.is_dir() or any(folder.iterdir())):
        raise KitError(f"WORK_DIR={folder} is not the quickstart's, and not empty: give a new folder")
    return folder


def steps_of(settings: QuickstartSettings, work: Path, platform: str) -> list[Step]:
    """The steps for `settings`, with the scripts of the folder `platform`."""
    commands = Commands(settings, work, platform)
    return list(commands.own() if settings.input else commands.sample())


def own_kind(settings: QuickstartSettings) -> str:
    """The stage that INPUT is data for: "pretrain" or "finetune"."""
    assert settings.input
    return "finetune" if kind_of(settings.input) == "sft" else "pretrain"


def has_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint."""
    try:
        return find_checkpoint(folder) is not None
    except KitError:
        return False


@dataclass(frozen=True)
class Commands:
    """The commands of the steps; paths are relative to the kit's folder."""

    settings: QuickstartSettings
    work: Path
    platform: str

    def sample(self) -> Iterator[Step]:
        """The sample data, a small model for it, and both stages of training."""
        yield Step(
            name="sample",
            title=TITLES["sample"],
            command=self.python("make", folder=self.path("sample"), seed=str(self.settings.seed)),
            output=self.work / "sample",
            is_complete=lambda folder: (folder / QUESTIONS).is_file(),
        )
        model = self.path("sample/model")
        yield self.preprocess("pretrain", self.path(f"sample/{TEXTS}"), model)
        yield self.preprocess("finetune", self.path(f"sample/{CHATS}"), model)
        yield self.to_megatron(model)
        for kind, start in (("pretrain", "megatron"), ("finetune", "pretrain")):
            yield self.train(kind, start, {**SAMPLE, **SAMPLE_STAGE[kind]})
        yield self.to_torch("finetune")
        yield self.to_huggingface()
        yield self.ask(model, self.path(f"sample/{QUESTIONS}"), NUM_QUESTIONS, max_new_tokens=16)

    def own(self) -> Iterator[Step]:
        """The user's model, trained on the user's rows in the stage that they are data for."""
        own, kind = self.settings, own_kind(self.settings)
        assert own.input and own.hf_model_path
        files, folder = find_inputs(own.input), Path(own.hf_model_path).absolute()
        others = [folder / name for name in model_files(folder).files]
        reads = tuple(path.absolute() for path in (*files, *others, *folder.glob("*.safetensors")))
        paths = [shown(path.absolute()) for path in files]
        rows = paths[0] if len(paths) == 1 else shlex.join(paths)
        hyperparameters = {
            "SEQ_LENGTH": str(own.seq_length),
            "MICRO_BATCH_SIZE": str(own.micro_batch_size),
            "GLOBAL_BATCH_SIZE": str(own.global_batch_size),
            "EPOCHS": f"{own.epochs:g}",
            "LR": f"{own.lr:g}",
            "MIN_LR": "0",
            "LOG_INTERVAL": "1",
        }
        if kind == "finetune":
            hyperparameters["TRUNCATE"] = own.truncate
            hyperparameters["PACKING"] = "false"  # so that few rows make several steps
        yield replace(self.preprocess(kind, rows, shown(folder)), reads=reads)
        yield self.to_megatron(shown(folder))
        yield self.train(kind, "megatron", hyperparameters)
        yield self.to_torch(kind)
        yield self.to_huggingface()
        yield self.ask(shown(folder), rows, SHOWN_ROWS, max_new_tokens=64)

    def path(self, name: str) -> str:
        """`name` in WORK_DIR."""
        return shown(self.work / name)

    def python(self, command: str, **flags: str) -> tuple[str, ...]:
        """A command of this package."""
        words = (word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), value))
        return (shown(Path(sys.executable)), "-m", "common.demo", command, *words)

    def script(self, name: str, script: str, settings: dict[str, str]) -> Step:
        """A step that runs one of the numbered scripts and writes the folder `name`."""
        command = ("bash", f"{self.platform}/{script}")
        return Step(name=name, title=TITLES[name], command=command, settings=settings, output=self.work / name)

    def preprocess(self, kind: str, rows: str, model: str) -> Step:
        """jsonl to tokens."""
        pretraining = kind == "pretrain"
        settings = {"INPUT": rows, "OUTPUT_PREFIX": self.path(f"tokens_{kind}/rows"), "TOKENIZER_PATH": model}
        if not pretraining and self.settings.roles != "system":
            settings["ROLES"] = self.settings.roles
        script = "1_preprocess_pretrain.sh" if pretraining else "1_preprocess_sft.sh"
        step = self.script(f"tokens_{kind}", script, settings)
        return replace(step, is_complete=lambda folder: (folder / "rows.json").is_file(), resumes=True)

    def to_megatron(self, model: str) -> Step:
        """Hugging Face to Megatron."""
        settings = {
            "CONVERT_TYPE": "huggingface-to-megatron",
            "LOAD_CHECKPOINT_PATH": model,
            "SAVE_CHECKPOINT_PATH": self.path("megatron"),
        }
        step = self.script("megatron", "2_convert_between_hf_megatron.sh", settings)
        return replace(step, is_complete=has_checkpoint)

    def train(self, kind: str, start: str, hyperparameters: dict[str, str]) -> Step:
        """A stage of training that starts from the weights in `start`."""
        settings = {
            "TRAIN_MODE": kind,
            "DATASET_PATH": self.path(f"tokens_{kind}/rows"),
            "LOAD_CHECKPOINT_PATH": self.path(start),
            "SAVE_CHECKPOINT_PATH": self.path(kind),
            "TP": str(self.settings.tp),
            "GPUS": str(self.settings.gpus),
            **hyperparameters,
            "SEED": str(self.settings.seed),
        }
        step = self.script(kind, "3_run_mcore_qwen.sh", settings)
        return replace(step, is_complete=has_checkpoint, resumes=True, uses_port=True)

    def to_torch(self, source: str) -> Step:
        """The distributed checkpoint in torch format."""
        settings = {
            "TRAIN_OR_CONVERT_CKPT": "convert",
            "LOAD_CHECKPOINT_PATH": self.path(source),
            "SAVE_CHECKPOINT_PATH": self.path("torch"),
            "TP": str(self.settings.tp),
            "GPUS": str(self.settings.gpus),
        }
        step = self.script("torch", "3_run_mcore_qwen.sh", settings)
        return replace(step, is_complete=has_checkpoint, uses_port=True)

    def to_huggingface(self) -> Step:
        """Megatron to Hugging Face."""
        settings = {
            "CONVERT_TYPE": "megatron-to-huggingface",
            "LOAD_CHECKPOINT_PATH": self.path("torch"),
            "SAVE_CHECKPOINT_PATH": self.path("huggingface"),
        }
        step = self.script("huggingface", "2_convert_between_hf_megatron.sh", settings)
        return replace(step, is_complete=lambda folder: (folder / "config.json").is_file())

    def ask(self, before: str, rows: str, count: int, max_new_tokens: int) -> Step:
        """Questions to the model before and after training."""
        command = self.python(
            "ask",
            before=before,
            after=self.path("huggingface"),
            input=rows,
            count=str(count),
            roles=self.settings.roles,
            max_new_tokens=str(max_new_tokens),
            folder=self.path("answers"),
        )
        return Step(
            name="answers",
            title=TITLES["answers"],
            command=command,
            output=self.work / "answers",
            is_complete=lambda folder: (folder / ANSWERS).is_file(),
        )
