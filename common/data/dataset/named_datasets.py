"""Datasets by name, each to be read once and whole: the validation sets of VALID_DATASET_PATH="law a general b".

    positions      0 ........ 9 | 10 11 | 12 ............ 26 | 27      with `multiple` 4: law 10 samples, general 15
    read there     law's samples  filler  general's samples    filler

A filler keeps micro-batches from being short or from mixing two datasets: the first sample of its dataset again, with a
loss mask of zeros. It adds nothing to the sum of losses and nothing to the number of tokens.
"""

import re
from bisect import bisect_right
from itertools import accumulate
from operator import mul

import numpy as np

from common.data.dataset.blended_dataset import is_blend_file, is_number, split_words
from common.data.dataset.manifest import DataFiles, resolve
from common.data.dataset.sample_dataset import SampleDataset
from common.errors import KitError

ALL = "all"  # what the log calls the loss over all sets
NAME = re.compile(r"[\w.-]+")


def read_named(text: str, setting: str = "VALID_DATASET_PATH") -> dict[str, DataFiles]:
    """The files of each dataset in `text`, "law /data/a general /data/b"; none where it is one dataset, or a blend.

    A path with spaces is quoted. Raises KitError for a name that cannot be one or stands twice, or has no path, and
    where a dataset is missing.
    """
    words = [] if is_blend_file(text) else split_words(text)
    names, paths = words[::2], words[1::2]
    if len(words) < 2 or all(map(is_number, names)):
        return {}
    rule = f"{setting}={text}"
    example = "give a name before each path, as in law /data/a general '/data/b c'"
    for name in names:
        if is_number(name) or name == ALL or not NAME.fullmatch(name):
            raise KitError(
                f"{rule}: {name!r} cannot be a name: one has letters, digits, '_', '-' and '.', and is neither a number"
                f" nor {ALL!r}; {example}"
            )
        if names.count(name) > 1:
            raise KitError(f"{rule}: the name {name!r} stands {names.count(name)} times: give each set its own")
    if len(paths) < len(names) or "" in paths:
        missing = names[paths.index("")] if "" in paths else names[-1]
        raise KitError(f"{rule}: the name {missing!r} has no path after it: {example}")
    return {name: resolve(path, f"{setting}'s {name}") for name, path in zip(names, paths, strict=True)}


class NamedDatasets:
    """Every sample of several datasets once, one dataset after the other, each filled up to a multiple of `multiple`.

    What is read beyond the last position is its dataset's filler.
    """

    def __init__(self, members: dict[str, SampleDataset], multiple: int) -> None:
        self.members, self.sizes = [*members.values()], {name: each.samples_per_epoch for name, each in members.items()}
        self.positions = {name: -(-size // multiple) * multiple for name, size in self.sizes.items()}
        self.samples_per_epoch = sum(self.sizes.values())
        self.weighted = any(samples.weighted for samples in self.members)
        self.order = ", ".join(samples.order for samples in self.members)
        self._starts = [0, *accumulate(self.positions.values())][:-1]

    @property
    def filled(self) -> float:
        """The share of the samples' positions that hold a token."""
        return self._mean([each.filled for each in self.members])

    @property
    def documents_per_sample(self) -> float:
        """How many conversations a sample holds on average."""
        return self._mean([each.documents_per_sample for each in self.members])

    def _mean(self, values: list[float]) -> float:
        """The mean over all samples of what each dataset's have."""
        return sum(map(mul, self.sizes.values(), values)) / self.samples_per_epoch

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        number = bisect_right(self._starts, position) - 1
        samples, index = self.members[number], position - self._starts[number]
        if index < samples.samples_per_epoch:
            return samples[index]
        filler = samples[0]
        return {**filler, "loss_mask": np.zeros_like(filler["loss_mask"])}
