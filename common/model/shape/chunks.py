"""Chunk sizes of the loss, in tokens; the memory estimate uses them too. Without torch."""

MAX_LOGITS_BYTES = 1 << 30
CHUNK_MULTIPLE = 256


def chunk_size(tokens: int, row_bytes: int) -> int:
    """Tokens per chunk: the fewest chunks of at most MAX_LOGITS_BYTES, as even as CHUNK_MULTIPLE allows.

    row_bytes: bytes of one token's logits.
    """
    most = max(CHUNK_MULTIPLE, MAX_LOGITS_BYTES // row_bytes // CHUNK_MULTIPLE * CHUNK_MULTIPLE)
    even = -(-tokens // -(-tokens // most)) if tokens else 0
    return max(CHUNK_MULTIPLE, -(-even // CHUNK_MULTIPLE) * CHUNK_MULTIPLE)


FUSED_CHUNK = 4096  # tokens: with fewer QuACK's GEMMs are slower (docs/benchmarks.md)


def fused_chunk_size(tokens: int, hidden_size: int) -> int:
    """Tokens per chunk of the loss that is fused into its GEMMs.

    No chunk may have hidden_size tokens: QuACK distinguishes the scales of rows and columns by their length. Each is a
    multiple of 128, to which QuACK pads the last.
    """
    for size in range(FUSED_CHUNK, 128, -128):
        last = -(-((tokens - 1) % size + 1) // 128) * 128
        if hidden_size not in (size, last):
            return size
    return 128
