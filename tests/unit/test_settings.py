"""A dataclass becomes a command line, and a command line the dataclass again."""

import argparse
import dataclasses
import re
from dataclasses import dataclass

import pytest

from common import settings as module
from common.chat.settings import ChatSettings
from common.checkpoint.conversion.hf_to_megatron import HfToMegatron
from common.checkpoint.conversion.megatron_to_hf import MegatronToHf
from common.errors import KitError
from common.evaluate.settings import EvaluateSettings
from common.preprocess import PretrainSettings, SftSettings
from common.settings import (
    OLD_NAMES,
    STEPS,
    add_options,
    check_environment,
    declared,
    from_namespace,
    nearest_setting,
    option,
    to_flags,
)
from common.training.settings import TrainSettings


@dataclass(frozen=True)
class Example:
    """One field of each kind."""

    data_path: str = option(help="where 100% of the data is")
    append_eod: bool = option(True, "whether it ends")
    micro_batch_size: int = option(2, "samples")
    lr: float = option(6.5e-5)
    epochs: float | None = option(None, "passes")
    seq_length: int | None = option(None)
    name: str | None = option(None)
    mode: str = option("train", "what to do", ("train", "convert"))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="x")
    add_options(made, Example)
    return made


def parse(*words: str) -> Example:
    return from_namespace(Example, parser().parse_args(words))


def test_what_is_not_given_has_its_default() -> None:
    assert parse("--data-path", "a") == Example("a")


def test_every_kind_of_value_is_read() -> None:
    words = "--data-path a --append-eod false --micro-batch-size 4 --lr 1e-3 --epochs 0.5 --seq-length 8 --name b"
    read = parse(*words.split(), "--mode", "convert")
    assert read == Example("a", False, 4, 1e-3, 0.5, 8, "b", "convert")
    assert [type(value) for value in dataclasses.astuple(read)] == [str, bool, int, float, float, int, str, str]


@pytest.mark.parametrize("text, value", [("true", True), ("True", True), ("FALSE", False)])
def test_true_and_false_are_read_in_any_case(text: str, value: bool) -> None:
    assert parse("--data-path=a", f"--append-eod={text}").append_eod is value


def test_the_last_of_two_values_counts() -> None:
    assert parse("--data-path=a", "--lr=1", "--lr=2").lr == 2.0


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--data-path"),
        (["--data-path=a", "--append-eod=1"], "'1' is neither true nor false"),
        (["--data-path=a", "--micro-batch-size=2.5"], "--micro-batch-size"),
        (["--data-path=a", "--mode=trian"], "trian"),
        (["--data-path=a", "--unknown=1"], "--unknown"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_shows_defaults_choices_and_kinds() -> None:
    text = " ".join(parser().format_help().split())
    assert "--data-path TEXT where 100% of the data is --append-eod" in text  # required: no default to show
    assert "--append-eod true|false whether it ends (default: true)" in text
    assert "--micro-batch-size N samples (default: 2)" in text
    assert "--lr X (default: 6.5e-05)" in text
    assert "--epochs X passes --seq-length N" in text  # None is no default worth telling
    assert "--mode {train,convert} what to do (default: train)" in text


@pytest.mark.parametrize(
    "settings",
    [
        Example("a"),
        Example("a b/it's", False, 3, 1 / 3, 1e-9, 7, "", "convert"),
        Example("-a", name="--lr"),
        Example("a=b", micro_batch_size=-1, lr=-1e-5),
    ],
    ids=str,
)
def test_the_flags_of_settings_give_them_again(settings: Example) -> None:
    assert parse(*to_flags(settings)) == settings


def test_a_processes_flags_give_the_launchers_settings_again() -> None:
    settings = TrainSettings(
        save_checkpoint_path="s", dataset_path="d", epochs=0.1, lr=1 / 3, packing=True, train_mode="finetune"
    )
    made = argparse.ArgumentParser()
    add_options(made, TrainSettings)
    assert from_namespace(TrainSettings, made.parse_args(to_flags(settings))) == settings


STEP_SETTINGS = (TrainSettings, PretrainSettings, SftSettings, ChatSettings, EvaluateSettings)


@pytest.mark.parametrize("kind", STEP_SETTINGS)
def test_every_default_is_one_of_its_choices(kind: type) -> None:
    for field in dataclasses.fields(kind):
        choices = field.metadata["choices"]
        assert not choices or field.default in (*choices, None), field.name


TRAINING = TrainSettings(save_checkpoint_path="s", dataset_path="d", epochs=1.0)


def test_the_scripts_settings_are_those_that_the_shell_finds() -> None:
    found = declared(STEPS, OLD_NAMES)
    assert {"MICRO_BATCH_SIZE", "TOKENIZER_PATH", "CONVERT_TYPE", "SAVE_DIST_CHECKPOINT_PATH"} <= found
    assert not {"PYTHON", "WORK_DIR", "LD_LIBRARY_PATH"} & found
    fields = {field.name.upper() for kind in (*STEP_SETTINGS, HfToMegatron, MegatronToHf)
              for field in dataclasses.fields(kind)}  # fmt: skip
    assert found - fields == {"CONVERT_TYPE", "SAVE_DIST_CHECKPOINT_PATH", "SAVE_TORCH_CHECKPOINT_PATH"}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MICROBATCH_SIZE", "MICRO_BATCH_SIZE"),
        ("GLOBALBATCHSIZE", "GLOBAL_BATCH_SIZE"),
        ("TRAIN_ITER", "TRAIN_ITERS"),
        ("LOG_INTERVALS", "LOG_INTERVAL"),
        ("ADAM_BETA_2", "ADAM_BETA2"),
        ("SEQ_LENGHT", "SEQ_LENGTH"),
        ("SEQ_LEN", "SEQ_LENGTH"),
        ("GLOBAL_BATCH", "GLOBAL_BATCH_SIZE"),
        ("micro_batch_size", "MICRO_BATCH_SIZE"),
        ("TOKENISER_PATH", "TOKENIZER_PATH"),
        ("SAVE_DIST_CHECKPOINTS_PATH", "SAVE_DIST_CHECKPOINT_PATH"),
    ],
)
def test_a_name_that_looks_like_a_setting_is_refused_with_the_nearest(name: str, meant: str) -> None:
    message = f"{name} is in the environment but is not a setting: write {meant}, or unset it"
    with pytest.raises(KitError, match=f"^{re.escape(message)}$"):
        check_environment(TRAINING, {"PATH": "/bin", name: "1"})


def test_all_such_names_are_reported_at_once() -> None:
    with pytest.raises(KitError, match=r"^TRAIN_ITER is .* TRAIN_ITERS, or unset it; ADAM_BETA_2 is .* ADAM_BETA2, or"):
        check_environment(TRAINING, {"TRAIN_ITER": "1", "ADAM_BETA_2": "0.9"})


def test_settings_of_any_step_are_accepted() -> None:
    every = declared(STEPS, OLD_NAMES, "*/env.sh", "cpu/quickstart.sh", "common/shell/*.sh")
    shell = ["PYTHON", "PYTHONPATH", "VENV", "PYTHON_BASE", "TORCH_INDEX_URL", "PIP_INDEX_URL", "KIT_PLATFORM"]
    check_environment(TRAINING, dict.fromkeys([*every, *shell], "1"))


def test_an_experts_flag_is_not_read_from_the_environment() -> None:
    message = "CORE_ATTENTION=sdpa is not read from the environment: pass `-- --core-attention=sdpa`, or unset it"
    with pytest.raises(KitError, match=f"^{re.escape(message)}$"):
        check_environment(TRAINING, {"CORE_ATTENTION": "sdpa"})
    check_environment(dataclasses.replace(TRAINING, core_attention="sdpa"), {"CORE_ATTENTION": "sdpa"})
    check_environment(TRAINING, {"SEQUENCE_PARALLEL": "True"})


def test_the_first_words_of_another_given_setting_are_left_alone() -> None:
    check_environment(TRAINING, {"SEQ_LEN": "4096", "SEQ_LENGTH": "4096"})


def test_without_the_scripts_nothing_is_known_of_their_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", "nowhere/*.sh")
    monkeypatch.setattr(module, "OLD_NAMES", "nowhere/*.sh")
    check_environment(TRAINING, {"MICROBATCH_SIZE": "1", "CORE_ATTENTION": "sdpa"})


ENVIRONMENTS = {
    "a login": """SHELL TERM USER LOGNAME HOME PATH PWD OLDPWD LANG LC_ALL LC_CTYPE HOSTNAME HOST SHLVL EDITOR
        PAGER LESS DISPLAY MAIL TMPDIR TZ XDG_RUNTIME_DIR XDG_SESSION_ID XDG_DATA_DIRS SSH_CLIENT SSH_CONNECTION SSH_TTY
        SSH_AUTH_SOCK LS_COLORS PS1 HISTSIZE COLUMNS LINES VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV CONDA_SHLVL
        CONDA_PROMPT_MODIFIER MODULEPATH MODULESHOME LOADEDMODULES LMOD_CMD http_proxy https_proxy no_proxy
        HTTP_PROXY PIP_INDEX_URL PIP_CACHE_DIR UV_CACHE_DIR PYTHONPATH PYTHONUNBUFFERED PYTHONWARNINGS PYTHONHASHSEED
        PYTHONSAFEPATH PYTHON3 PYTHON_VERSION LD_PRELOAD LIBRARY_PATH CPATH CC CXX CFLAGS MAKEFLAGS GIT_EDITOR""",
    "Slurm": """SLURM_JOB_ID SLURM_JOBID SLURM_JOB_NAME SLURM_JOB_NODELIST SLURM_NODELIST SLURM_JOB_NUM_NODES
        SLURM_NNODES SLURM_NODEID SLURM_NODE_ALIASES SLURM_PROCID SLURM_LOCALID SLURM_NTASKS SLURM_NPROCS
        SLURM_NTASKS_PER_NODE SLURM_TASKS_PER_NODE SLURM_CPUS_PER_TASK SLURM_CPUS_ON_NODE SLURM_JOB_CPUS_PER_NODE
        SLURM_GPUS SLURM_GPUS_ON_NODE SLURM_GPUS_PER_NODE SLURM_GPUS_PER_TASK SLURM_GTIDS SLURM_JOB_GPUS SLURM_STEP_ID
        SLURM_STEPID SLURM_STEP_GPUS SLURM_STEP_NODELIST SLURM_STEP_NUM_NODES SLURM_STEP_NUM_TASKS
        SLURM_STEP_LAUNCHER_PORT SLURM_SRUN_COMM_HOST SLURM_SRUN_COMM_PORT SLURM_SUBMIT_DIR SLURM_SUBMIT_HOST
        SLURM_JOB_PARTITION SLURM_JOB_ACCOUNT SLURM_JOB_QOS SLURM_JOB_USER SLURM_JOB_UID SLURM_JOB_START_TIME
        SLURM_JOB_END_TIME SLURM_RESTART_COUNT SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID SLURM_ARRAY_TASK_COUNT
        SLURM_MEM_PER_NODE SLURM_MEM_PER_CPU SLURM_TOPOLOGY_ADDR SLURM_TOPOLOGY_ADDR_PATTERN SLURM_CLUSTER_NAME
        SLURM_CONF SLURM_DISTRIBUTION SLURM_LAUNCH_NODE_IPADDR SLURM_PRIO_PROCESS SLURM_UMASK SLURM_WORKING_CLUSTER
        SLURM_EXPORT_ENV SLURM_CPU_BIND SLURM_MPI_TYPE SLURM_PMIX_MAPPING_SERV SBATCH_PARTITION SRUN_CPUS_PER_TASK
        PMI_RANK PMI_SIZE PMIX_RANK OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK
        ENVIRONMENT PARTITION ACCOUNT NODELIST NODES NTASKS GPUS_PER_NODE NUM_GPUS NUM_NODES JOB_ID JOB_NAME""",
    "Kubernetes": """KUBERNETES_SERVICE_HOST KUBERNETES_SERVICE_PORT KUBERNETES_SERVICE_PORT_HTTPS KUBERNETES_PORT
        KUBERNETES_PORT_443_TCP KUBERNETES_PORT_443_TCP_PROTO KUBERNETES_PORT_443_TCP_PORT
        KUBERNETES_PORT_443_TCP_ADDR MASTER_SERVICE_HOST MASTER_SERVICE_PORT POD_NAME POD_NAMESPACE POD_IP NODE_NAME
        NODE_IP JOB_COMPLETION_INDEX VC_TASK_INDEX VC_WORKER_HOSTS VC_WORKER_NUM VK_TASK_INDEX WORKDIR WORKSPACE
        DATA_DIR DATA_PATH MODEL_PATH MODEL_NAME MODEL_DIR CHECKPOINT_PATH CHECKPOINT_DIR OUTPUT_DIR OUTPUT_PATH""",
    "PyTorchJob": """WORLD_SIZE RANK LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE
        ROLE_NAME NPROC_PER_NODE MASTER_ADDR MASTER_PORT PET_NNODES PET_NODE_RANK PET_NPROC_PER_NODE PET_MASTER_ADDR
        PET_MASTER_PORT PET_MAX_RESTARTS PET_RDZV_ID PET_RDZV_BACKEND PET_RDZV_ENDPOINT PET_RDZV_CONF PET_STANDALONE
        TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_USE_AGENT_STORE
        TORCHELASTIC_ERROR_FILE TORCHELASTIC_SIGNALS_TO_HANDLE HOROVOD_RANK HOROVOD_SIZE HOROVOD_LOCAL_RANK
        HOROVOD_FUSION_THRESHOLD HOROVOD_TIMELINE RAY_ADDRESS""",
    "libraries": """NCCL_DEBUG NCCL_DEBUG_SUBSYS NCCL_IB_DISABLE NCCL_IB_HCA NCCL_IB_GID_INDEX NCCL_IB_TIMEOUT
        NCCL_SOCKET_IFNAME NCCL_P2P_DISABLE NCCL_P2P_LEVEL NCCL_NET_GDR_LEVEL NCCL_CROSS_NIC NCCL_ALGO NCCL_PROTO
        NCCL_MAX_NCHANNELS NCCL_MIN_NCHANNELS NCCL_BUFFSIZE NCCL_NVLS_ENABLE NCCL_TOPO_FILE NCCL_VERSION
        MCCL_IB_HCA MCCL_SOCKET_IFNAME MCCL_MAX_NCHANNELS MCCL_DEBUG GLOO_SOCKET_IFNAME TP_SOCKET_IFNAME
        WANDB_API_KEY WANDB_BASE_URL WANDB_CACHE_DIR WANDB_CONFIG_DIR WANDB_CONSOLE WANDB_DATA_DIR WANDB_DIR
        WANDB_DISABLED WANDB_ENTITY WANDB_HOST WANDB_JOB_TYPE WANDB_LOG_MODEL WANDB_MODE WANDB_NAME WANDB_NOTES
        WANDB_PROJECT WANDB_QUIET WANDB_RESUME WANDB_RUN_GROUP WANDB_RUN_ID WANDB_SERVICE WANDB_SILENT WANDB_TAGS
        WANDB_USERNAME WANDB_WATCH OMP_NUM_THREADS OMP_PROC_BIND OMP_PLACES MKL_NUM_THREADS OPENBLAS_NUM_THREADS
        NUM_WORKERS TOKENIZERS_PARALLELISM HF_HOME HF_TOKEN HF_ENDPOINT HF_HUB_OFFLINE HF_HUB_CACHE
        HF_DATASETS_CACHE HF_DATASETS_OFFLINE TRANSFORMERS_CACHE TRANSFORMERS_OFFLINE MODELSCOPE_CACHE
        CUDA_HOME CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_DEVICE_MAX_CONNECTIONS CUDA_LAUNCH_BLOCKING
        CUDA_MODULE_LOADING CUDA_CACHE_PATH CUDA_VERSION CUDA_DRIVER_VERSION CUBLAS_VERSION CUBLAS_WORKSPACE_CONFIG
        CUDNN_VERSION NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES NVIDIA_REQUIRE_CUDA NVIDIA_PRODUCT_NAME
        NVIDIA_PYTORCH_VERSION PYTORCH_VERSION PYTORCH_BUILD_VERSION PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF
        TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_NCCL_TRACE_BUFFER_SIZE TORCH_DISTRIBUTED_DEBUG TORCH_CUDA_ARCH_LIST
        TORCH_HOME TORCH_ALLOW_TF32_CUBLAS_OVERRIDE TORCH_CPP_LOG_LEVEL TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR
        TRANSFORMER_ENGINE_VERSION NVTE_FLASH_ATTN NVTE_FUSED_ATTN NVTE_DEBUG NVTE_ALLOW_NONDETERMINISTIC_ALGO
        NVTE_FRAMEWORK USE_EXPERIMENTAL_CUDNN_V8_API MACA_PATH MACA_SMALL_PAGESIZE_ENABLE UCX_TLS SHARP_COLL_LOG_LEVEL
        OPAL_PREFIX OPENMPI_VERSION OMPI_MCA_coll_hcoll_enable RDMACORE_VERSION BASH_ENV JUPYTER_PORT
        TENSORBOARD_PORT MELLANOX_VISIBLE_DEVICES""",
}


@pytest.mark.parametrize("where", ENVIRONMENTS)
def test_names_of_other_programs_are_left_alone(where: str) -> None:
    check_environment(TRAINING, dict.fromkeys(ENVIRONMENTS[where].split(), "1"))


def test_one_typo_is_recognized_only_in_a_long_name() -> None:
    names = ["PACKING", "GLOBAL_BATCH_SIZE"]
    assert nearest_setting("PACKINGS", names) == "PACKING"
    assert nearest_setting("PACKIN", names) is None
    assert nearest_setting("GLOBAL_BACTH_SIZE", names) == "GLOBAL_BATCH_SIZE"
    assert nearest_setting("GLOBAL_BATCHES_SIZE", names) is None
    assert nearest_setting("PACK", names) is None
