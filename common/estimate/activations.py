"""Bytes of activations saved for the backward pass, tensor by tensor, and of temporary buffers.

The method is that of Korthikanti et al. (arXiv 2205.05198, section 4), applied to the tensors that these layers save.
Letters: n tokens of a micro-batch on this rank, n' = n / TP with sequence parallelism, else n, h hidden_size,
q, k, f, v this rank's part of query rows, key rows, intermediate_size and vocabulary, d head_dim, e element bytes.
"""

from dataclasses import dataclass
from functools import cached_property

from common.estimate.weights import ELEMENT_BYTES, Chunk, vocabulary_parameters
from common.model.shape.chunks import chunk_size, fused_chunk_size
from common.model.shape.config import QwenConfig
from common.model.shape.lora import ROW_PARALLEL, LoraConfig
from common.model.shape.masks import takes_mask


@dataclass(frozen=True)
class Workload:
    """What the activations of one micro-batch on one rank depend on."""

    qwen: QwenConfig
    seq_length: int
    micro_batch_size: int
    tp: int
    cp: int
    sequence_parallel: bool
    precision: str
    transformer_impl: str
    recompute: str
    recompute_num_layers: int | None  # with full: the first of each chunk; None: all
    separate: bool  # PACKING or RESET_ATTENTION: rows of several documents, each attending to itself
    fused_kernels: bool
    fused_products: bool  # SwiGLU, and at TP 1 the loss, fused into the GEMMs
    lora: LoraConfig | None = None  # adapters on frozen weights, which have no gradients
    recomputed_loss: bool = False  # preferences: the output layer runs again in the backward pass
    core_attention: str = "auto"
    fp8_recipe: str = ""  # of the layers' GEMMs, whose inputs are then saved in FP8; empty: none
    tp_copies: bool = False  # the run may overlap TP's communication with its GEMMs by the GPUs' copy engines

    @cached_property
    def transformer_engine(self) -> bool:
        """Whether the layers are Transformer Engine's."""
        return self.transformer_impl == "transformer_engine"

    @property
    def thd(self) -> bool:
        """Whether rows of several documents are packed sequences in Transformer Engine's "thd" format."""
        return self.separate and self.transformer_engine and self.cp == 1

    @property
    def masked(self) -> bool:
        """Whether attention has a mask [b, 1, s, s]."""
        return self.separate and not self.thd and takes_mask(self.micro_batch_size, self.seq_length, self.cp)

    @property
    def mask_elements(self) -> int:
        """Elements of that mask."""
        return self.micro_batch_size * self.seq_length**2

    @cached_property
    def gathered(self) -> bool:
        """Whether attention gathers the keys and values of whole rows, instead of Transformer Engine's ring."""
        # FlashAttention 4 comes with the requirements of the fused products, and gathers.
        engine = self.transformer_engine and self.core_attention == "auto" and not self.fused_products
        return self.cp > 1 and not (engine and not self.separate)

    @property
    def by_parts(self) -> bool:
        """Whether attention's output is put together from those of documents, or of a row's two chunks."""
        return not self.masked and (self.gathered or (self.separate and not self.thd))

    @cached_property
    def exchanging(self) -> bool:
        """Whether TP's communication is overlapped with GEMMs by the GPUs' copy engines."""
        supported = self.sequence_parallel and self.precision == "bf16" and not self.fp8_recipe
        return self.tp_copies and self.tp > 1 and supported

    @property
    def fused_loss(self) -> bool:
        """Whether the loss is fused into the output layer's GEMMs, as at TP 1."""
        return self.fused_products and self.tp == 1

    @cached_property
    def element_bytes(self) -> int:
        """Bytes of an element, e."""
        return ELEMENT_BYTES[self.precision]

    @cached_property
    def tokens(self) -> int:
        """Tokens of a micro-batch on this rank, n."""
        return self.seq_length * self.micro_batch_size // self.cp

    @cached_property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states of all n tokens, e n h."""
        return self.element_bytes * self.tokens * self.qwen.hidden_size

    @cached_property
    def residual_bytes(self) -> int:
        """Bytes of the hidden states between the layers, e n' h."""
        return self.hidden_bytes // self.tp if self.sequence_parallel and self.tp > 1 else self.hidden_bytes

    @cached_property
    def query_bytes(self) -> int:
        """Bytes of the queries, e n q."""
        return self.element_bytes * self.tokens * self.qwen.num_attention_heads * self.qwen.head_dim // self.tp

    @cached_property
    def key_bytes(self) -> int:
        """Bytes of the keys, or of the values, e n k."""
        return self.element_bytes * self.tokens * self.qwen.num_key_value_heads * self.qwen.head_dim // self.tp

    @cached_property
    def mlp_bytes(self) -> int:
        """Bytes of one of the MLP's two halves, e n f."""
        return self.element_bytes * self.tokens * self.qwen.intermediate_size // self.tp

    @cached_property
    def layer_bytes(self) -> int:
        """Bytes of `layer_tensors`."""
        return sum(layer_tensors(self).values())

    @cached_property
    def layer_gradient_bytes(self) -> int:
        """Bytes of `gradient_bytes`."""
        return gradient_bytes(self)


def norm_bytes(work: Workload, rows: int, num_bytes: int) -> int:
    """Bytes that an RMSNorm of `rows` rows, `num_bytes` bytes, saves: its input and one float32 per row.

    Unfused, it saves a float32 copy of the input and the normalized rows in float32 instead.
    """
    return 4 * rows + (num_bytes if work.fused_kernels else 2 * num_bytes * 4 // work.element_bytes)


def query_key_norm_bytes(work: Workload) -> int:
    """Bytes that Qwen3's norms of each query and key head save.

    Inputs that are views of the local QKV output are saved with it: the keys, and with one group the queries.
    """
    groups = work.qwen.num_key_value_heads // work.tp
    heads = work.qwen.num_attention_heads // work.tp
    kept = norm_bytes(work, work.tokens * heads, work.query_bytes) + norm_bytes(
        work, work.tokens * groups, work.key_bytes
    )
    if work.fused_kernels and not work.transformer_engine:
        kept -= work.key_bytes + (work.query_bytes if groups == 1 else 0)
    return kept


def adapter_bytes(work: Workload) -> int:
    """Bytes that a layer's adapters save beside their inputs, which the frozen layers no longer save: A x, e n r each.

    Of a row-parallel layer it is scattered over the sequence with sequence parallelism.
    """
    if work.lora is None:
        return 0
    n, scattered = work.tokens, work.residual_bytes // (work.element_bytes * work.qwen.hidden_size)
    rows = sum(scattered if module in ROW_PARALLEL else n for module in work.lora.targets)
    return work.element_bytes * work.lora.rank * rows


def attention_tensors(work: Workload) -> dict[str, int]:
    """Bytes of the tensors that a layer's attention saves, from the output of linear_qkv to its own output.

    Query, key and value are separate tensors where kernels/qkv_rope.py computes them (megatron-core 0.15 and later),
    and in Transformer Engine's attention. Otherwise value is a view of the QKV output in local layers, which keeps all
    of it alive; so are the inputs of a recomputed attention (selective). Where they are gathered, keys and values of
    whole rows are saved.
    """
    qkv = work.query_bytes + 2 * work.key_bytes
    heads = work.qwen.num_attention_heads // work.tp
    fused_qkv_rope = work.fused_kernels and not work.qwen.qk_norm and not work.thd
    value_is_view = not fused_qkv_rope and (not work.transformer_engine or work.recompute == "selective")
    gathered = work.cp if work.gathered and work.recompute != "selective" else 1
    kept = {
        "query and key": work.query_bytes + gathered * work.key_bytes,
        "value": qkv if value_is_view and gathered == 1 else gathered * work.key_bytes,
        "attention output": work.query_bytes,
    }
    if work.by_parts and work.recompute != "selective":
        kept["parts of the output"] = work.query_bytes
    if work.recompute != "selective":
        kept["softmax statistics"] = 4 * work.tokens * heads
    if not work.transformer_engine and not fused_qkv_rope:
        # cosine and sine [s, d], computed for query and for key
        kept["rope"] = 4 * work.element_bytes * work.seq_length // work.cp * work.qwen.head_dim
    if work.masked and work.recompute != "selective":
        kept["attention mask"] = work.element_bytes * work.mask_elements  # as a bias in the layer's dtype
    if work.qwen.qk_norm:
        kept["query and key norm"] = query_key_norm_bytes(work)
    return kept


def layer_tensors(work: Workload) -> dict[str, int]:
    """Bytes of the tensors that one layer saves; with full recomputation, those that exist while it is recomputed."""
    rows = work.residual_bytes // (work.element_bytes * work.qwen.hidden_size)
    gathers_before = work.fused_products and not work.exchanging
    before_mlp = work.hidden_bytes if gathers_before else work.residual_bytes
    # unfused: silu(gate), a copy of up (in Megatron-Core 0.16) and their product
    swiglu = work.mlp_bytes if work.fused_kernels else 3 * work.mlp_bytes
    tensors = {
        # and their outputs, the inputs of the next GEMMs
        "norms": 2 * norm_bytes(work, rows, work.residual_bytes) + work.residual_bytes + before_mlp,
        **attention_tensors(work),
        "gate and up": 2 * work.mlp_bytes,
        "swiglu": 0 if work.fused_products else swiglu,
        "adapters": adapter_bytes(work),
    }
    if work.fp8_recipe:  # a byte an element of the GEMMs' inputs; attention keeps its output in bf16 beside
        tensors["norms"] -= work.residual_bytes
        tensors["attention output"] += work.query_bytes // 2
        tensors["swiglu"] -= work.mlp_bytes // 2
    return tensors


def recomputed_layers(work: Workload, chunk: Chunk) -> int:
    """Number of layers at the start of a chunk that save only their input (RECOMPUTE=full)."""
    if work.recompute != "full":
        return 0
    return min(work.recompute_num_layers or chunk.num_layers, chunk.num_layers)


def kept_by_layers(work: Workload, chunk: Chunk) -> int:
    """Bytes that the layers of a chunk save in the forward pass for the backward pass."""
    recomputed = recomputed_layers(work, chunk)
    return recomputed * work.residual_bytes + (chunk.num_layers - recomputed) * work.layer_bytes


def kept_by_chunk(work: Workload, chunk: Chunk) -> int:
    """Bytes that autograd saves for one micro-batch in a chunk, without the loss, which `loss_bytes` counts."""
    kept = kept_by_layers(work, chunk)
    if work.masked and work.recompute != "none":
        kept += work.mask_elements  # the mask, bool, one for all layers
    if chunk.first:
        kept += 8 * work.tokens  # token ids, int64
        if work.tp > 1:
            kept += work.tokens  # the mask of ids in other ranks' vocabulary, bool
    if chunk.last:
        kept += final_norm_bytes(work)
    return kept


def logits_bytes(work: Workload) -> int:
    """Peak bytes of the logits and of the tensors computed from them.

    A chunk's [c, v] are freed when the next chunk's exist. Without Triton's kernels there are also two float32 copies,
    or one if they are float32 themselves. Fused into the GEMMs, one buffer holds the exponentials of every chunk, with
    two float32 values and two scales for each 128 or more columns, and the chunk's scaled hidden states.
    """
    rows = work.qwen.padded_vocab_size(work.tp) // work.tp
    if work.fused_loss:
        size = min(work.tokens, fused_chunk_size(work.tokens, work.qwen.hidden_size))
        return size * (work.element_bytes * (rows + work.qwen.hidden_size) + rows // 128 * 2 * (4 + work.element_bytes))
    size = chunk_size(work.tokens, rows * work.element_bytes)
    wide = 0 if work.fused_kernels else (8 if work.element_bytes < 4 else 4)
    chunks = [min(size, work.tokens - start) for start in range(0, work.tokens, size)]
    pairs = zip([0, *chunks], chunks, strict=False)
    return max(before * work.element_bytes + now * (work.element_bytes + wide) for before, now in pairs) * rows


def loss_bytes(work: Workload) -> int:
    """Peak bytes of the loss on the last stage, in its forward pass, besides those of the layers.

    Normalized hidden states (gathered with sequence parallelism), their gradient, the weight's in float32, logits.
    """
    gathered = work.hidden_bytes if work.residual_bytes < work.hidden_bytes else 0
    return (
        work.residual_bytes
        + gathered
        + work.hidden_bytes
        + (0 if work.lora else 4 * vocabulary_parameters(work.qwen, work.tp))
        + logits_bytes(work)
    )


def final_norm_bytes(work: Workload) -> int:
    """Bytes that the final norm saves."""
    return norm_bytes(work, work.residual_bytes // (work.element_bytes * work.qwen.hidden_size), work.residual_bytes)


def backward_bytes(work: Workload, chunk: Chunk) -> int:
    """Peak temporary bytes of the backward pass of a chunk's layers, besides what the chunk saved.

    The last layer's backward pass needs the most. If it is recomputed, all layers are, and its tensors exist again.
    """
    recomputed = recomputed_layers(work, chunk) == chunk.num_layers
    return work.layer_gradient_bytes + (work.layer_bytes if recomputed else 0)


def gradient_bytes(work: Workload) -> int:
    """Peak temporary bytes of one layer's backward pass besides what it saved: the largest of the MLP's three steps.

    Each step counts the gradients that exist then, less the saved tensors that are already freed. Local layers compute
    a weight's gradient before they add it to the float32 buffer.
    """
    weight = work.element_bytes * work.qwen.intermediate_size // work.tp * work.qwen.hidden_size
    gathered = work.hidden_bytes if work.residual_bytes < work.hidden_bytes else 0
    if work.fused_products:  # the gradients of gate and up replace them in place; three unused weight gradients
        return work.residual_bytes + gathered + work.mlp_bytes + work.hidden_bytes + 3 * weight
    weight = 0 if work.transformer_engine or work.lora else weight
    kept = layer_tensors(work)
    down = gathered + work.mlp_bytes + weight
    swiglu = 2 * work.mlp_bytes
    up = 2 * work.mlp_bytes + work.hidden_bytes + gathered + 2 * weight - kept["gate and up"] - kept["swiglu"]
    return work.residual_bytes + max(down, swiglu, up)
