"""The trigram model that docs/benchmarks.md compares a network with: its probabilities, and what it learns."""

import numpy as np

from tests.bench.trigram import BITS, Counts, packed, trigram_loss

VOCAB_SIZE = 12


def test_every_order_sums_to_one_and_repetition_is_learned() -> None:
    random = np.random.default_rng(0)
    stream = random.integers(0, VOCAB_SIZE, 400) % random.integers(1, VOCAB_SIZE, 400)
    trigrams = Counts(packed(stream[:-2], stream[1:-1], stream[2:]))
    bigrams = Counts(trigrams.keys & (1 << 2 * BITS) - 1)
    unigrams, words = Counts(bigrams.keys & (1 << BITS) - 1), np.arange(VOCAB_SIZE)
    for first, second in [(0, 0), (3, 5), (11, 11)]:  # 11 was never seen
        u, v = np.full(VOCAB_SIZE, first), np.full(VOCAB_SIZE, second)
        p1 = unigrams.interpolated(packed(words), np.full(VOCAB_SIZE, 1 / VOCAB_SIZE))
        p2 = bigrams.interpolated(packed(v, words), p1)
        for p in (p1, p2, trigrams.interpolated(packed(u, v, words), p2)):
            assert abs(p.sum() - 1) < 1e-12 and (p >= 0).all()
    uniform = trigram_loss(stream, [random.integers(0, VOCAB_SIZE, 500)], VOCAB_SIZE)
    cycle = np.tile(np.arange(10), 40)
    cycle[::37] = 11  # or no n-gram is seen once, and nothing is discounted
    assert trigram_loss(cycle, [np.tile(np.arange(10), 5)], VOCAB_SIZE) < 0.5 < 1.5 < uniform
