"""When attention within documents takes a mask; the memory estimate asks too. Without torch."""

# Of a mask; attention saves it as a bias in its tensors' dtype. That of one row of 8192, or of four of 4096.
MASK_ELEMENTS = 1 << 26


def takes_mask(num_rows: int, length: int, cp_size: int) -> bool:
    """Whether one mask is made for `num_rows` rows of `length`; otherwise each document is attended to by itself.

    Under context parallelism always by itself: with a mask, a rank would compute all scores of its queries and the row.
    """
    return cp_size == 1 and num_rows * length * length <= MASK_ELEMENTS
