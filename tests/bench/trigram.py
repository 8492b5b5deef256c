"""The loss of a trigram model on a run's validation samples, to hold what a network learned against.

    python -m tests.bench.trigram PREFIX --split 99,1,0 --seq-length 2048 --samples 256 --vocab-size 151936

PREFIX is step 1's, --samples are EVAL_ITERS x GLOBAL_BATCH_SIZE. The counts are of the training documents. The loss is
the mean over all labels of the samples in nats, as step 3 logs it. Interpolated Kneser-Ney smoothing with one discount
for each order, n1 / (n1 + 2 n2) (Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling",
TR-10-98, Harvard 1998, eqs. 14 and 26); the unigrams are interpolated with the uniform distribution.
"""

import argparse
import json
import time

import numpy as np

from common.data.dataset.builder import build_dataset, split_documents
from common.data.dataset.indexed_dataset import open_tokens
from common.data.dataset.manifest import resolve

BITS = 21  # of a token id in a packed n-gram: three fit into an int64


class Counts:
    """The counts of n-grams, packed into int64 [n]: how often each was seen, or in how many contexts."""

    def __init__(self, ngrams: np.ndarray) -> None:
        self.keys, self.counts = np.unique(ngrams, return_counts=True)
        n1, n2 = (int((self.counts == n).sum()) for n in (1, 2))
        self.discount = n1 / (n1 + 2 * n2)

    def of(self, keys: np.ndarray) -> np.ndarray:
        """The count of each of `keys`, 0 where there is none."""
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.counts[at], 0)

    def interpolated(self, keys: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """The probability of each n-gram's last token after the others, given the `lower` order's."""
        contexts = self.keys >> BITS
        starts = np.flatnonzero(np.diff(contexts, prepend=contexts[0] - 1))
        names, totals = contexts[starts], np.add.reduceat(self.counts, starts)
        types = np.diff(np.append(starts, len(contexts)))
        at = np.minimum(np.searchsorted(names, keys >> BITS), len(names) - 1)
        seen, total = names[at] == keys >> BITS, totals[at]
        found = np.maximum(self.of(keys) - self.discount, 0) / total + self.discount * types[at] / total * lower
        return np.where(seen, found, lower)


def packed(*tokens: np.ndarray) -> np.ndarray:
    """n-grams, the last token in the lowest bits."""
    result = np.zeros(len(tokens[0]), np.int64)
    for each in tokens:
        result = result << BITS | each.astype(np.int64)
    return result


def trigram_loss(train: np.ndarray, samples: list[np.ndarray], vocab_size: int) -> float:
    """The mean of -ln p over all but the first two tokens of each sample, [n + 1] tokens; the second by bigrams."""
    trigrams = Counts(packed(train[:-2], train[1:-1], train[2:]))
    bigrams = Counts(trigrams.keys & (1 << 2 * BITS) - 1)  # by how many tokens each follows
    unigrams = Counts(bigrams.keys & (1 << BITS) - 1)
    logs = []
    for sample in samples:
        u, v, w = sample[:-2], sample[1:-1], sample[2:]
        p1 = unigrams.interpolated(packed(sample[1:]), np.full(len(sample) - 1, 1 / vocab_size))
        p2 = bigrams.interpolated(packed(sample[:-1], sample[1:]), p1)
        logs.append(np.log(np.append(p2[:1], trigrams.interpolated(packed(u, v, w), p2[1:]))))
    return -float(np.concatenate(logs).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("prefix")
    parser.add_argument("--split", required=True)
    parser.add_argument("--seq-length", type=int, required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1234)
    arguments = parser.parse_args()
    began, files = time.monotonic(), resolve(arguments.prefix)
    tokens = open_tokens(files.tokens)
    train, held_out = split_documents(len(tokens), arguments.split)
    dataset = build_dataset(
        files, train_mode="pretrain", seq_length=arguments.seq_length, seed=arguments.seed, documents=held_out
    )
    samples = [np.append(dataset[i]["tokens"], dataset[i]["labels"][-1]) for i in range(arguments.samples)]
    stream = np.concatenate([tokens[i] for i in train])
    loss = trigram_loss(stream, samples, arguments.vocab_size)
    print(json.dumps({"loss": round(loss, 4), "train_tokens": len(stream), "s": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
