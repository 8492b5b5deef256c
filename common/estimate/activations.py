"""Bytes of activations saved for the backward pass, tensor by tensor, and of temporary buffers.

The idea is that of Korthikanti et al. (arXiv 2205.05198, section 4); the tensors are those that these layers keep.
Letters: n tokens of a micro-batch on this rank, n' its part of them where sequence parallelism divides, h hidden_size,
q, k, f, v this rank's share of query rows, key rows, intermediate_size and vocabulary, d head_dim, e element bytes.
"""

from dataclasses import dataclass

from common.estimate.weights import ELEMENT_BYTES, Chunk, vocabulary_parameters
from common.model.shape.chunks import chunk_size, fused_chunk_size
from common.model.shape.config import QwenConfig


@dataclass(frozen=True)
class Work:
    """What decides how much a rank keeps of one micro-batch."""

    qwen: QwenConfig
    seq_length: int
    micro_batch_size: int
    tp: int
    cp: int
    sequence_parallel: bool
    precision: str
    transformer_impl: str
    recompute: str
    recompute_num_layers: int | None  # with full: the first so many of a chunk; None: all
    masked: bool  # packing or reset_attention in local layers: attention with a mask [b, 1, s, s]
    joined: bool  # the same in Transformer Engine's: rows joined to one, of which attention is told the bounds
    fused_kernels: bool
    fused_products: bool  # SwiGLU, and at TP 1 the loss, inside matrix products

    @property
    def engine(self) -> bool:
        """Whether the layers are Transformer Engine's."""
        return self.transformer_impl == "transformer_engine"

    @property
    def fused_loss(self) -> bool:
        """Whether the loss is inside the output layer's products, as at TP 1."""
        return self.fused_products and self.tp == 1

    @property
    def element(self) -> int:
        """e."""
        return ELEMENT_BYTES[self.precision]

    @property
    def tokens(self) -> int:
        """n."""
        return self.seq_length * self.micro_batch_size // self.cp

    @property
    def hidden(self) -> int:
        """Bytes of the hidden states of all n tokens, e n h."""
        return self.element * self.tokens * self.qwen.hidden_size

    @property
    def stream(self) -> int:
        """Bytes of the hidden states between the layers, e n' h."""
        return self.hidden // self.tp if self.sequence_parallel and self.tp > 1 else self.hidden

    @property
    def query(self) -> int:
        """Bytes of the queries, e n q."""
        return self.element * self.tokens * self.qwen.num_attention_heads * self.qwen.head_dim // self.tp

    @property
    def key(self) -> int:
        """Bytes of the keys, or of the values, e n k."""
        return self.element * self.tokens * self.qwen.num_key_value_heads * self.qwen.head_dim // self.tp

    @property
    def mlp(self) -> int:
        """Bytes of one of the MLP's two halves, e n f."""
        return self.element * self.tokens * self.qwen.intermediate_size // self.tp


def norm_bytes(work: Work, rows: int, stream: int) -> int:
    """What an RMSNorm of `rows` rows, `stream` bytes, keeps: its input and a float32 a row.

    Unfused it keeps, in place of the input, its float32 copy and the normalized rows in float32.
    """
    return 4 * rows + (stream if work.fused_kernels else 2 * stream * 4 // work.element)


def query_key_norm_bytes(work: Work) -> int:
    """What Qwen3's norms of each head of query and key keep.

    Inputs that are views of the local QKV product are kept with it: the keys, and the queries where there is one group.
    """
    groups = work.qwen.num_key_value_heads // work.tp
    heads = work.qwen.num_attention_heads // work.tp
    kept = norm_bytes(work, work.tokens * heads, work.query) + norm_bytes(work, work.tokens * groups, work.key)
    if work.fused_kernels and not work.engine:
        kept -= work.key + (work.query if groups == 1 else 0)
    return kept


def attention_tensors(work: Work) -> dict[str, int]:
    """What the attention of a layer keeps, from the QKV product's output to its own.

    Query, key and value are tensors of their own where kernels/qkv_rope.py makes them (megatron-core 0.15 and
    later), and in Transformer Engine's attention. Else the local value is a view of the QKV product, which it keeps as
    a whole; so does a checkpointed attention's (selective), whose inputs are the tensors before that.
    """
    qkv = work.query + 2 * work.key
    heads = work.qwen.num_attention_heads // work.tp
    apart = work.fused_kernels and not work.qwen.qk_norm and not work.joined
    whole = not apart and (not work.engine or work.recompute == "selective")
    kept = {
        "query and key": work.query + work.key,
        "value": qkv if whole else work.key,
        "attention output": work.query,
    }
    if work.recompute != "selective":
        kept["softmax statistics"] = 4 * work.tokens * heads
    if not work.engine and not apart:
        # cosine and sine [s, d], made anew for query and key
        kept["rope"] = 4 * work.element * work.seq_length // work.cp * work.qwen.head_dim
    if work.masked and work.recompute != "selective":
        # the mask as a bias [b, 1, s, s] in the layer's own dtype
        kept["attention mask"] = work.element * work.micro_batch_size * work.seq_length**2
    if work.qwen.qk_norm:
        kept["query and key norm"] = query_key_norm_bytes(work)
    return kept


def layer_tensors(work: Work) -> dict[str, int]:
    """What one layer keeps, or of a wholly recomputed one what it keeps while it is computed again."""
    rows = work.stream // (work.element * work.qwen.hidden_size)
    before_mlp = work.hidden if work.fused_products else work.stream  # gathered there
    # unfused, silu(gate) and (Megatron-Core 0.16's) a copy of up beside their product
    swiglu = work.mlp if work.fused_kernels else 3 * work.mlp
    return {
        # and the outputs, for the products after them
        "norms": 2 * norm_bytes(work, rows, work.stream) + work.stream + before_mlp,
        **attention_tensors(work),
        "gate and up": 2 * work.mlp,
        "swiglu": 0 if work.fused_products else swiglu,
    }


def recomputed_layers(work: Work, chunk: Chunk) -> int:
    """Layers of a chunk, its first ones, that keep their input alone and are computed again as a whole."""
    if work.recompute != "full":
        return 0
    return min(work.recompute_num_layers or chunk.num_layers, chunk.num_layers)


def kept_by_layers(work: Work, chunk: Chunk) -> int:
    """Bytes that the layers of a chunk keep from their forward to their backward pass."""
    again = recomputed_layers(work, chunk)
    return again * work.stream + (chunk.num_layers - again) * sum(layer_tensors(work).values())


def kept_by_chunk(work: Work, chunk: Chunk) -> int:
    """Bytes that autograd keeps of one micro-batch in a chunk; without the loss, whose tensors `loss_bytes` counts."""
    kept = kept_by_layers(work, chunk)
    if work.masked and work.recompute != "none":
        kept += work.micro_batch_size * work.seq_length**2  # the mask, bool, one for all layers
    if chunk.first:
        kept += 8 * work.tokens  # token numbers, int64
        if work.tp > 1:
            kept += work.tokens  # which of them are other ranks', bool
    if chunk.last:
        kept += final_norm_bytes(work)
    return kept


def logits_bytes(work: Work) -> int:
    """The most that logits and what is made of them take at once.

    A chunk's [c, v] are freed when the next one's are there. Without Triton's kernels there are two float32 copies of
    them too, or one where they are float32 themselves. Inside products their exponentials take one place for all
    chunks, with two float32 and two scales for each 128 or more of a row, and a chunk's hidden states times theirs.
    """
    rows = work.qwen.padded_vocab_size(work.tp) // work.tp
    if work.fused_loss:
        size = min(work.tokens, fused_chunk_size(work.tokens, work.qwen.hidden_size))
        return size * (work.element * (rows + work.qwen.hidden_size) + rows // 128 * 2 * (4 + work.element))
    size = chunk_size(work.tokens, rows * work.element)
    wide = 0 if work.fused_kernels else (8 if work.element < 4 else 4)
    chunks = [min(size, work.tokens - start) for start in range(0, work.tokens, size)]
    pairs = zip([0, *chunks], chunks, strict=False)
    return max(before * work.element + now * (work.element + wide) for before, now in pairs) * rows


def loss_bytes(work: Work) -> int:
    """What the last stage needs for the loss beside its layers: the most, which is in its forward pass.

    Hidden states after the norm (gathered under sequence parallelism), their gradient, the weight's in float32, logits.
    """
    gathered = work.hidden if work.stream < work.hidden else 0
    return work.stream + gathered + work.hidden + 4 * vocabulary_parameters(work.qwen, work.tp) + logits_bytes(work)


def final_norm_bytes(work: Work) -> int:
    """What the norm after the last layer keeps."""
    return norm_bytes(work, work.stream // (work.element * work.qwen.hidden_size), work.stream)


def backward_bytes(work: Work, chunk: Chunk) -> int:
    """What the backward pass of a chunk's layers needs for a moment beside what the chunk keeps.

    That of its last layer needs the most; if it is recomputed, so are all, and its tensors are there again.
    """
    again = recomputed_layers(work, chunk) == chunk.num_layers
    return gradient_bytes(work) + (sum(layer_tensors(work).values()) if again else 0)


def gradient_bytes(work: Work) -> int:
    """What the backward pass of one layer needs for a moment beside what it keeps: the most of its MLP's three steps.

    Each is told by the gradients that exist then and by what was kept and is gone. Local layers make each weight's
    gradient before it is added to the float32 one.
    """
    weight = work.element * work.qwen.intermediate_size // work.tp * work.qwen.hidden_size
    gathered = work.hidden if work.stream < work.hidden else 0
    if work.fused_products:  # both halves' gradients take their place; three weights' stand-ins wait for autograd
        return work.stream + gathered + work.mlp + work.hidden + 3 * weight
    weight = 0 if work.engine else weight
    kept = layer_tensors(work)
    down = gathered + work.mlp + weight
    swiglu = 2 * work.mlp
    up = 2 * work.mlp + work.hidden + gathered + 2 * weight - kept["gate and up"] - kept["swiglu"]
    return work.stream + max(down, swiglu, up)
