"""The embedding and output layer of a model that was given new tokens, as they must be."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint.verification.independent_readers import HfTensors, StoredTensor

GROWING = ("model.embed_tokens.weight", "lm_head.weight")


class GrownTensor:
    """A matrix of the vocabulary with rows for new tokens: each the mean of others, and the rest the mean of all."""

    def __init__(self, before: StoredTensor, sources: Mapping[int, Sequence[int]], num_rows: int) -> None:
        self._before, self.dtype, self.shape = before, before.dtype, (num_rows, *before.shape[1:])
        self._rows = {row: _mean(before, ids).to(self.dtype) for row, ids in sources.items()}
        self._old = before.shape[0]
        self._rest = _mean(before, range(self._old)).to(self.dtype) if num_rows > self._old else None

    def rows(self, start: int, stop: int, columns: range | None = None) -> Tensor:
        """As StoredTensor, only `columns` if given."""
        held = [self._before.rows(start, min(stop, self._old)).clone()] if start < self._old else []
        if self._rest is not None and stop > self._old:
            held.append(self._rest.expand(stop - max(start, self._old), -1).clone())
        whole = torch.cat(held)
        for row, values in self._rows.items():
            if start <= row < stop:
                whole[row - start] = values
        return whole if columns is None else whole[:, columns.start : columns.stop]


def _mean(tensor: StoredTensor, ids: Sequence[int]) -> Tensor:
    """The mean of rows, in float64."""
    total, step = torch.zeros(tensor.shape[1], dtype=torch.float64), 4096
    if isinstance(ids, range):
        for start in range(ids.start, ids.stop, step):
            total += tensor.rows(start, min(start + step, ids.stop)).to(torch.float64).sum(dim=0)
    else:
        for row in ids:
            total += tensor.rows(row, row + 1)[0].to(torch.float64)
    return total / len(ids)


class GrownHfTensors(HfTensors):
    """The tensors of a Hugging Face folder, with those of the vocabulary grown."""

    def __init__(self, folder: Path, sources: Mapping[int, Sequence[int]], num_rows: int) -> None:
        super().__init__(folder)
        names = [name for name in GROWING if name in self.names]
        self._grown = {name: GrownTensor(super(GrownHfTensors, self).tensor(name), sources, num_rows) for name in names}

    def tensor(self, name: str) -> Any:
        """The tensor `name`; raises KeyError where there is none."""
        return self._grown[name] if name in self._grown else super().tensor(name)
