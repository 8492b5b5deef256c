"""Preference rows to token ids and the loss mask: two documents a row, that of the chosen answer, then the rejected."""

from collections import Counter
from typing import Any

import numpy as np

from common.data.encoders.encoded import BAD_ROWS, EncodedChunk
from common.data.encoders.sft import Segment, SftEncoder
from common.data.sources.bad_rows import BadRowError, BadRows
from common.data.sources.chunks import Chunk
from common.data.sources.jsonl import records
from common.data.templates.preference_rows import Pair, to_pair
from common.data.templates.row_formats import check_format

Sample = tuple[np.ndarray, np.ndarray]  # ids and loss mask


class PreferenceEncoder(SftEncoder):
    """Encodes pairs with the chat template; the last answer of each conversation is in the loss.

    Its `loss_turns` must be "last" and `weighted` false.
    """

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        """The tokens of the pairs in `chunk`, chosen before rejected, and a mask of 1 in their answers."""
        counts: Counter[str] = Counter()
        bad = BadRows(chunk, self.skip_bad_rows)
        pairs, offsets = [], []
        for offset, row in records(chunk, counts, bad):
            with bad.row(offset):
                pairs.append(self.segments_of_pair(row, counts))
                offsets.append(offset)
        encoded = self._encode([segments for pair in pairs for segments in pair])
        samples = []
        for offset, pair, chosen, rejected in zip(offsets, pairs, encoded[::2], encoded[1::2], strict=True):
            with bad.row(offset):
                self._check(chosen, pair[0])
                self._check(rejected, pair[1])
                check_same_prompt(chosen, rejected)
                samples += [chosen, rejected]
        counts["read"] = len(samples) // 2 + len(bad.rows)
        counts[BAD_ROWS] = len(bad.rows)
        return self._encoded(samples, counts, bad)

    def segments_of_pair(self, row: dict[str, Any], counts: Counter[str]) -> tuple[list[Segment], list[Segment]]:
        """The rendered segments of the chosen and the rejected conversation of `row`; raises BadRowError."""
        pair = self.pair(row)
        return self.segments_of(pair.chosen, counts), self.segments_of(pair.rejected, counts)

    def segments_of_row(self, row: dict[str, Any], counts: Counter[str]) -> list[Segment]:
        """The rendered segments of both conversations of `row`; raises BadRowError."""
        chosen, rejected = self.segments_of_pair(row, counts)
        return chosen + rejected

    def pair(self, row: dict[str, Any]) -> Pair:
        """The pair of `row`; raises BadRowError."""
        if self.same_format:
            check_format(row, self.format)
        return to_pair(row, self.roles)


def check_same_prompt(chosen: Sample, rejected: Sample) -> None:
    """Raises BadRowError unless the ids before both answers are equal, and those of the answers are not."""
    (ids, mask), (other_ids, other_mask) = chosen, rejected
    start = int(np.argmax(mask > 0))
    if start != int(np.argmax(other_mask > 0)) or not np.array_equal(ids[:start], other_ids[:start]):
        raise BadRowError("the chat template renders the prompt differently before its two answers")
    if np.array_equal(ids, other_ids):
        raise BadRowError("its 'chosen' and 'rejected' answers are equal as tokens: there is nothing to prefer")
