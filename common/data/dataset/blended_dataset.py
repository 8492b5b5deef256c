"""Megatron's BlendedDataset: several datasets by weight. The sample at a position depends only on the position.

The first dataset takes its share of all positions, evenly spread; the second its share of the remaining ones, and so
on. After any number of samples each dataset is off its share by fewer samples than the number of datasets. Weights are
exact fractions, so the shares do not drift in a long run.

Hand-written: Megatron-Core's blending index is built for a fixed number of samples and takes memory for each of them.
"""

import json
import shlex
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from common.data.dataset.manifest import FORMAT, DataFiles, resolve
from common.data.dataset.sample_dataset import SampleDataset
from common.errors import KitError
from common.log import logger

Blend = list[tuple[Fraction, DataFiles]]


def read_blend(text: str, name: str = "DATASET_PATH") -> Blend:
    """(weight, files) of each dataset in `text`: one path, or "0.7 a 0.3 b", or a JSON file.

    The JSON is [{"weight": 0.7, "path": "a"}, ...]. Raises KitError for any other text, or when a dataset is missing.
    """
    if is_blend_file(text):
        return [(weight, resolve(path, name)) for weight, path in _read_blend_json(Path(text), name)]
    words = split_words(text)
    if len(words) < 2:
        return [(Fraction(1), resolve(text, name))]
    if len(words) % 2:
        raise KitError(f"{name}={text}: give one dataset, or a weight before each: 0.7 a 0.3 b")
    pairs = zip(words[::2], words[1::2], strict=True)
    return [(_parse_weight(weight, name), resolve(path, name)) for weight, path in pairs]


def is_blend_file(text: str) -> bool:
    """Whether `text` is the path of a JSON file that exists."""
    return Path(text).suffix == ".json" and Path(text).is_file()


def split_words(text: str) -> list[str]:
    """The words of `text`, quoted as in a shell; none where `text` is the path of one dataset, or has an open quote."""
    try:
        return [] if _is_dataset(text) else shlex.split(text)
    except ValueError:
        return []


def _is_dataset(text: str) -> bool:
    try:
        resolve(text)
    except KitError:
        return False
    return True


def _read_blend_json(path: Path, name: str) -> list[tuple[Fraction, str]]:
    rule = f'{name}={path}: it must hold a list of {{"weight": 0.7, "path": "..."}}'
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_float=str, parse_int=str)
    except ValueError as error:
        raise KitError(f"{rule}, but it is not JSON ({error})") from error
    if isinstance(content, dict) and content.get("format") == FORMAT:
        raise KitError(f"{name}={path} is the manifest of a dataset: remove .json from the path")
    if not isinstance(content, list) or not content:
        raise KitError(rule)
    pairs = []
    for each in content:
        if not isinstance(each, dict) or set(each) != {"weight", "path"} or not isinstance(each["path"], str):
            raise KitError(f"{rule}; {json.dumps(each)} is not one")
        pairs.append((_parse_weight(each["weight"], name), each["path"]))
    return pairs


def is_number(word: str) -> bool:
    """Whether `word` is written as a number, so also 0, -1 and nan, which are no weights."""
    for kind in (float, Fraction):
        with suppress(ValueError, ZeroDivisionError):
            kind(word)
            return True
    return False


def _parse_weight(word: Any, name: str) -> Fraction:
    try:
        weight = Fraction(0 if isinstance(word, bool) else word)
    except (ValueError, TypeError, ZeroDivisionError):
        weight = Fraction(0)
    if weight <= 0:
        raise KitError(f"{name}: the weight {word!r} is not a positive number: give a weight before each path")
    return weight


class BlendedDataset:
    """Samples of several datasets by weight. An epoch has as many samples as all datasets; each repeats as needed."""

    def __init__(self, members: list[tuple[Fraction, str, SampleDataset]]) -> None:
        self.members = [samples for _, _, samples in members]
        weights = [weight for weight, _, _ in members]
        # (numerator, denominator) of each dataset's share of what the ones before it left.
        shares = [weight / sum(weights[i:]) for i, weight in enumerate(weights)]
        self._shares = [(share.numerator, share.denominator) for share in shares]
        self.samples_per_epoch = sum(samples.samples_per_epoch for samples in self.members)
        self.order = ", ".join(samples.order for samples in self.members)
        self.weighted = any(samples.weighted for samples in self.members)
        self.description = ", ".join(
            f"{weight} of {samples.samples_per_epoch}" for weight, samples in zip(weights, self.members, strict=True)
        )
        for (weight, name, samples), count in zip(members, self.counts(self.samples_per_epoch), strict=True):
            logger.info(
                "blend: %s: %.4f of the samples, %d per epoch = %.2f epochs of it",
                name, weight / sum(weights), count, count / samples.samples_per_epoch,
            )  # fmt: skip

    @property
    def filled(self) -> float:
        """The share of an epoch's positions that hold a token."""
        return self._mean([samples.filled for samples in self.members])

    @property
    def documents_per_sample(self) -> float:
        """How many conversations a sample holds on average."""
        return self._mean([samples.documents_per_sample for samples in self.members])

    def _mean(self, values: list[float]) -> float:
        """The mean over an epoch of what each dataset's samples have."""
        counts = self.counts(self.samples_per_epoch)
        return sum(count * value for count, value in zip(counts, values, strict=True)) / self.samples_per_epoch

    def place(self, global_index: int) -> tuple[int, int]:
        """(dataset index, sample index in it) at a position, as Megatron's dataset index and dataset sample index."""
        left = global_index
        for number, (share, of) in enumerate(self._shares):
            before = left * share // of
            if (left + 1) * share // of > before:
                return number, before
            left -= before
        raise AssertionError("the share of the last dataset is 1")

    def counts(self, number: int) -> list[int]:
        """How many of the first `number` positions each dataset takes."""
        counts = []
        for share, of in self._shares:
            counts.append(number * share // of)
            number -= counts[-1]
        return counts

    def __getitem__(self, global_index: int) -> dict[str, np.ndarray]:
        number, index = self.place(global_index)
        return self.members[number][index]


def blend_datasets(members: list[tuple[Fraction, str, SampleDataset]]) -> SampleDataset:
    """The blend of `members`; a single dataset is returned unchanged."""
    return members[0][2] if len(members) == 1 else BlendedDataset(members)
