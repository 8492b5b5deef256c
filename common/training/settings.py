"""TrainSettings: every setting of step 3, declared once; the command line is made from it."""

import math
from dataclasses import dataclass

from common.errors import KitError
from common.parallel import ParallelSizes, parse_pipeline_layers
from common.settings import option

MASTER_PORT = 29500  # torchrun's own


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a run; raises KitError for values that contradict each other."""

    save_checkpoint_path: str = option(help="where checkpoints go, and where a run resumes from")
    train_or_convert_ckpt: str = option(
        "train", "train, or turn the newest distributed checkpoint into torch format", ("train", "convert")
    )
    train_mode: str = option(
        "pretrain", "pretrain: every token is learned; finetune: the answers", ("pretrain", "finetune")
    )
    dataset_path: str | None = option(None, "what step 1 wrote (its OUTPUT_PREFIX), or several by weight: 0.7 a 0.3 b")
    valid_dataset_path: str | None = option(None, "validation data of its own; then SPLIT is not used")
    split: str = option("98,2,0", "shares of the documents for training, validation and nothing")
    load_checkpoint_path: str | None = option(None, "weights to start from: what step 2 wrote, or another run")
    hf_model_path: str | None = option(None, "only to train from scratch: folder with config.json and tokenizer")
    is_initial_run: str = option("auto", "auto: resume if there is what to resume", ("auto", "true", "false"))
    tp: int = option(1, "tensor parallel size; above 1, sequence parallel too")
    pp: int = option(1, "pipeline parallel size")
    vpp: int = option(1, "virtual pipeline chunks a rank")
    pipeline_layers: str | None = option(None, "layers of each stage (with VPP of each chunk), as 7,7,8,6")
    cp: int = option(1, "context parallel size")
    gpus: int = option(1, "processes on this node, one a GPU")
    nnodes: int = option(1, "number of nodes")
    node_rank: int = option(0, "this node's number, from 0")
    master_addr: str = option("localhost", "address of node 0")
    master_port: int | None = option(None, "a free port on node 0; default: any free one on one node, else 29500")
    rdzv_endpoint: str | None = option(None, "host:port where the nodes meet, instead of the three above")
    rdzv_id: str = option("kit", "the run's name there")
    max_restarts: int = option(0, "times the processes are started again, from the newest checkpoint")
    seq_length: int = option(2048, "tokens in a sample")
    micro_batch_size: int = option(2, "samples a GPU runs at once")
    global_batch_size: int = option(16, "samples in one step over all GPUs")
    epochs: float | None = option(None, "passes over the training data; this or TRAIN_ITERS")
    train_iters: int | None = option(None, "steps; this or EPOCHS")
    seed: int = option(1234, "of random weights and of the order of samples")
    precision: str = option("bf16", "bf16 has float32 master weights and gradients", ("bf16", "fp32"))
    fp8_format: str = option("none", "matrix products in FP8 (Transformer Engine)", ("none", "hybrid", "e4m3"))
    fp8_recipe: str = option("tensorwise", "how FP8 is scaled", ("tensorwise", "delayed", "blockwise"))
    optimizer_state: str = option(
        "fp32",
        "bf16: Adam's moments in bf16, 14 bytes a parameter, not 18; cpu: with master weights on the host, 6 bytes",
        ("fp32", "bf16", "cpu"),
    )
    lr: float = option(6.5e-5, "highest learning rate")
    min_lr: float = option(2.5e-6, "learning rate at the end")
    lr_warmup_iters: int = option(0, "steps of linear warm-up from 0")
    lr_decay_style: str = option("cosine", "", ("cosine", "linear", "constant"))
    weight_decay: float = option(0.01, "not applied to norms and biases")
    adam_beta1: float = option(0.9)
    adam_beta2: float = option(0.999)
    adam_eps: float = option(1e-8)
    clip_grad: float = option(1.0, "largest gradient norm; 0: no clipping")
    save_interval: int = option(100, "steps between checkpoints; the last step is always saved")
    keep_checkpoints: int = option(3, "newest checkpoints to keep; 0: all")
    keep_every: int = option(0, "keep besides each checkpoint whose iteration this divides; 0: none")
    keep_best: int = option(0, "keep besides so many of the lowest validation loss; 0: none")
    keep_epochs: bool = option(False, "save at the end of each epoch, and keep that checkpoint besides")
    save_optimizer: bool = option(True, "false: checkpoints hold weights alone, from which no run can be resumed")
    async_save: bool = option(False, "torch_dist only: write checkpoints while training goes on")
    eval_interval: int = option(100, "steps between evaluations; 0: none")
    eval_iters: int = option(50, "global batches in one evaluation")
    log_interval: int = option(10, "steps between log lines")
    exit_interval: int | None = option(None, "save and stop at a step this divides")
    exit_duration_min: float | None = option(None, "save and stop so many minutes after the start of the command")
    max_bad_steps: int = option(5, "stop after so many steps in a row whose loss or gradient is not finite; 0: never")
    skip_grad_norm: float | None = option(None, "skip a step whose gradient norm is above it")
    hang_timeout_min: float | None = option(
        None, "minutes without progress after which a rank is named; default: 0.8 of DISTRIBUTED_TIMEOUT_MIN; 0: never"
    )
    overlap_grad_reduce: bool = option(True, "with DP x CP above 1: reduce gradients during the backward pass")
    overlap_param_gather: bool = option(True, "with DP x CP above 1: gather weights during the forward pass")
    deterministic: bool = option(False, "the same bits on the same GPUs, by slower kernels")
    recompute: str = option("none", "activations computed again in backward", ("none", "selective", "full"))
    recompute_num_layers: int | None = option(None, "with full: only so many layers of each chunk; default: all")
    tp_comm_overlap: bool = option(False, "Transformer Engine, TP above 1: send while matrix products run")
    max_first_loss: float | None = option(None, "stop if the first loss is above it: the weights are not right")
    packing: bool = option(False, "finetune: several samples a row, kept apart")
    truncate: str = option("error", "finetune samples over SEQ_LENGTH", ("error", "drop", "left", "right"))
    reset_attention: bool = option(False, "pretrain: keep the documents of one sample apart")
    wandb_project: str | None = option(None, "log to Weights & Biases under this project")
    wandb_exp_name: str | None = option(None, "name of the run there")
    wandb_mode: str = option("online", "", ("online", "offline", "disabled"))
    wandb_save_path: str | None = option(None, "folder for its files")
    ckpt_format: str | None = option(None, "torch_dist or torch; default: the platform's", ("torch_dist", "torch"))
    transformer_impl: str | None = option(None, "layers; default: the platform's", ("transformer_engine", "local"))
    core_attention: str = option(
        "auto", "auto: the platform's first that works here", ("auto", "flash_attn", "flash_attn_4", "sdpa")
    )
    fused_products: str = option(
        "auto", "SwiGLU and loss inside matrix products, by QuACK; auto: where it works", ("auto", "true", "false")
    )
    sequence_parallel: bool = option(True, "with TP above 1: split activations over the sequence too")
    num_workers: int = option(2, "processes that read batches ahead; 0: none")
    distributed_timeout_min: int = option(10, "minutes after which a rank that waits gives up")

    def __post_init__(self) -> None:
        positive = ("seq_length", "micro_batch_size", "global_batch_size", "save_interval", "log_interval", "gpus")
        for name in (*positive, "nnodes", "distributed_timeout_min"):
            self._need(getattr(self, name) >= 1, name, "it must be at least 1")
        steps = ("keep_checkpoints", "keep_every", "keep_best", "max_bad_steps", "eval_interval", "eval_iters")
        not_negative = (*steps, "lr_warmup_iters", "weight_decay", "hang_timeout_min")
        for name in (*not_negative, "clip_grad", "num_workers", "max_restarts"):
            self._need((getattr(self, name) or 0) >= 0, name, "it must not be negative")
        for name in ("adam_eps", "exit_duration_min", "skip_grad_norm"):
            self._need(getattr(self, name) is None or getattr(self, name) > 0, name, "it must be above 0")
        for name in ("adam_beta1", "adam_beta2"):
            self._need(0 <= getattr(self, name) < 1, name, "it must be at least 0 and below 1")
        self._need(self.recompute_num_layers is None or self.recompute_num_layers >= 1, "recompute_num_layers",
                   "it must be at least 1")  # fmt: skip
        self._need(self.exit_interval is None or self.exit_interval >= 1, "exit_interval", "it must be at least 1")
        self._need(self.epochs is None or 0 < self.epochs < math.inf, "epochs", "it must be a number above 0")
        self._need(self.train_iters is None or self.train_iters >= 1, "train_iters", "it must be at least 1")
        self._need(0 <= self.min_lr <= self.lr, "min_lr", f"it must lie between 0 and LR={self.lr}")
        self._check_nodes()
        self._check_checkpoints()
        if self.train_or_convert_ckpt == "train":
            self._need(bool(self.dataset_path), "dataset_path", "training needs what step 1 wrote: set DATASET_PATH")
            if (self.epochs is None) == (self.train_iters is None):
                raise KitError(f"EPOCHS={self.epochs} and TRAIN_ITERS={self.train_iters}: set one of them")
        elif not self.load_checkpoint_path:
            raise KitError("LOAD_CHECKPOINT_PATH is not set: convert reads the distributed checkpoint there")
        if self.recompute_num_layers and self.recompute != "full":
            raise KitError(
                f"RECOMPUTE_NUM_LAYERS={self.recompute_num_layers} goes with RECOMPUTE=full, not {self.recompute}"
            )
        if self.precision != "bf16" and (self.fp8_format != "none" or self.optimizer_state == "bf16"):
            raise KitError(
                f"FP8_FORMAT={self.fp8_format} and OPTIMIZER_STATE={self.optimizer_state} need PRECISION=bf16, not"
                f" {self.precision}"
            )
        sizes = self.sizes
        if self.sequence_parallel and self.seq_length % self.tp:
            raise KitError(
                f"SEQ_LENGTH={self.seq_length} cannot be divided by TP={self.tp}, which sequence parallelism needs:"
                f" use a multiple of {self.tp}"
            )
        if self.packing and self.train_mode == "pretrain":
            raise KitError("PACKING=true is for TRAIN_MODE=finetune; pretraining samples are always full")
        if self.reset_attention and self.train_mode == "finetune":
            raise KitError("RESET_ATTENTION=true is for TRAIN_MODE=pretrain; packed samples are always kept apart")
        num_microbatches = sizes.num_microbatches(self.global_batch_size, self.micro_batch_size)
        if self.vpp > 1 and num_microbatches % self.pp:
            raise KitError(
                f"VPP={self.vpp} needs micro-batches a step in multiples of PP={self.pp}, and GLOBAL_BATCH_SIZE="
                f"{self.global_batch_size} gives {num_microbatches}: change GLOBAL_BATCH_SIZE or MICRO_BATCH_SIZE"
            )

    def _check_nodes(self) -> None:
        self._need(0 <= self.node_rank < self.nnodes, "node_rank", f"it must be below NNODES={self.nnodes}")
        if self.rdzv_endpoint:
            host, _, port = self.rdzv_endpoint.rpartition(":")
            self._need(bool(host) and port.isdecimal(), "rdzv_endpoint", "give host:port, as node0:29400")
        elif self.max_restarts and self.nnodes > 1:
            raise KitError(
                f"MAX_RESTARTS={self.max_restarts} with NNODES={self.nnodes}: nodes that return need a meeting place;"
                " set RDZV_ENDPOINT=host:port on each, one of the nodes and a free port there"
            )
        elif self.nnodes > 1 and self.node_rank and self.master_addr == "localhost":
            raise KitError(f"MASTER_ADDR=localhost on NODE_RANK={self.node_rank}: set it to the address of node 0")
        if self.max_restarts and self.is_initial_run == "true":
            raise KitError(
                f"IS_INITIAL_RUN=true with MAX_RESTARTS={self.max_restarts}: a restart resumes, which true forbids:"
                " set IS_INITIAL_RUN=auto"
            )

    def _check_checkpoints(self) -> None:
        if self.keep_best and not self.eval_interval:
            raise KitError(
                f"KEEP_BEST={self.keep_best} goes by the validation loss, and EVAL_INTERVAL=0: set one of them"
            )
        if not self.save_optimizer and self.max_restarts:
            raise KitError(
                f"SAVE_OPTIMIZER=false with MAX_RESTARTS={self.max_restarts}: weights alone cannot be resumed from: set"
                " one of them"
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise KitError(
                "OVERLAP_PARAM_GATHER=true with OVERLAP_GRAD_REDUCE=false: Megatron-Core gathers weights in the buckets"
                " of the gradients' reduction: set OVERLAP_PARAM_GATHER=false too"
            )

    def _need(self, holds: bool, name: str, rule: str) -> None:
        if not holds:
            raise KitError(f"{name.upper()}={getattr(self, name)}: {rule}")

    @property
    def overlaps(self) -> tuple[bool, bool]:
        """Whether gradients are reduced during backward, and weights gathered during forward: not by one replica."""
        several = self.sizes.replicas > 1
        return several and self.overlap_grad_reduce, several and self.overlap_param_gather

    @property
    def meeting_place(self) -> tuple[str, int]:
        """Host and port where the nodes find each other."""
        if not self.rdzv_endpoint:
            return self.master_addr, self.master_port or MASTER_PORT
        host, _, port = self.rdzv_endpoint.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def sizes(self) -> ParallelSizes:
        """The parallel sizes over all nodes."""
        layers = parse_pipeline_layers(self.pipeline_layers)
        return ParallelSizes(self.gpus * self.nnodes, self.tp, self.pp, self.vpp, self.cp, layers)
