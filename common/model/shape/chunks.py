"""How many tokens' logits exist at once: what the loss cuts by, and the estimate of memory counts by. Without torch."""

MAX_LOGITS_BYTES = 1 << 30
CHUNK_MULTIPLE = 256


def chunk_size(tokens: int, row_bytes: int) -> int:
    """Tokens of a chunk: the fewest chunks of MAX_LOGITS_BYTES at most, as even as CHUNK_MULTIPLE allows.

    row_bytes: of a token's logits.
    """
    most = max(CHUNK_MULTIPLE, MAX_LOGITS_BYTES // row_bytes // CHUNK_MULTIPLE * CHUNK_MULTIPLE)
    even = -(-tokens // -(-tokens // most)) if tokens else 0
    return max(CHUNK_MULTIPLE, -(-even // CHUNK_MULTIPLE) * CHUNK_MULTIPLE)


FUSED_CHUNK = 4096  # tokens: fewer leave QuACK's products slower (docs/benchmarks.md)


def fused_chunk_size(tokens: int, hidden_size: int) -> int:
    """Tokens of a chunk where the loss is inside its products.

    No chunk may have as many as hidden_size, whose scales QuACK could not tell from those of columns; and each, but for
    the last, a multiple of 128, to which it fills up the last.
    """
    for size in range(FUSED_CHUNK, 128, -128):
        last = -(-((tokens - 1) % size + 1) // 128) * 128
        if hidden_size not in (size, last):
            return size
    return 128
