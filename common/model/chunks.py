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
