"""float32 master weights kept as the 16 bits that the model's bf16 weights lack of them.

The weight is the master rounded to the nearest bf16, ties up: (bits + 0x8000) >> 16. The remainder is the difference of
their bits, master - (weight << 16), which an int16 holds, so the pair is the master to the bit. Transformer Engine's
Adam keeps it so (store_param_remainders; AdamFunctorMasterParamRemainder in common/multi_tensor/adam.cu of 2.11).
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from common.engine.optimizer import adam_param
from common.errors import KitError

INT16_MIN, INT16_MAX = -(1 << 15), (1 << 15) - 1


def merge(weight: Tensor, remainder: Tensor) -> Tensor:
    """The masters, float32, of a bf16 `weight` and its int16 `remainder`; on the device of `weight`."""
    bits = weight.detach().view(torch.int16).to(torch.int32)
    bits <<= 16
    bits += remainder.to(weight.device, non_blocking=True)
    return bits.view(torch.float32)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """(bf16 weight, int16 remainder) of a float32 `master`, which must be contiguous."""
    bits = master.detach().view(torch.int32)
    weight = (bits + 0x8000) >> 16
    return weight.to(torch.int16).view(torch.bfloat16), (bits - (weight << 16)).to(torch.int16)


def remainders(master: Tensor, weight: Tensor) -> Tensor:
    """What the bf16 `weight` lacks of the float32 `master`, int16, on the device of `weight`.

    Where a tie was rounded down to an even weight, as other optimizers do, the master loses one unit in the last place:
    its remainder, 32768, has no int16. Raises KitError where `weight` is not a rounding of `master`.
    """
    bits = master.detach().contiguous().view(torch.int32).to(weight.device)
    difference = bits - (weight.detach().contiguous().view(torch.int16).to(torch.int32) << 16)
    wrong = (difference < INT16_MIN) | (difference > INT16_MAX + 1)
    if bool(wrong.any()):
        at = wrong.reshape(-1).nonzero()[0]
        pair = [float(each.reshape(-1).to(weight.device)[at]) for each in (master, weight)]
        raise KitError(
            f"{int(wrong.sum())} of {wrong.numel()} master weights are not those of the weights beside them, for"
            f" example {pair[0]:.8g} and {pair[1]:.8g}: a weight must be its master rounded to bf16. Resume from"
            " another checkpoint, or start from this one's weights alone (LOAD_CHECKPOINT_PATH)"
        )
    return difference.clamp_(max=INT16_MAX).to(torch.int16)


class MasterWeights:
    """Stands for the float32 masters of `weight` (bf16) and `remainder` (int16), of one shape, without building them.

    It has of a tensor what saving and loading need. The weights must be loaded first.
    """

    dtype = torch.float32

    def __init__(self, weight: Tensor, remainder: Tensor) -> None:
        self.weight, self.remainder = weight.detach(), remainder

    @property
    def shape(self) -> torch.Size:
        """Of the masters."""
        return self.weight.shape

    @property
    def is_cuda(self) -> bool:
        """Whether `blocks` are on a GPU."""
        return self.weight.is_cuda

    @property
    def nbytes(self) -> int:
        """Of the float32 masters."""
        return 4 * self.numel()

    def numel(self) -> int:
        """The number of elements."""
        return self.weight.numel()

    def detach(self) -> "MasterWeights":
        """Itself: it has no gradient."""
        return self

    def view(self, shape: int | tuple[int, ...]) -> "MasterWeights":
        """The same elements in another shape."""
        return MasterWeights(self.weight.reshape(shape), self.remainder.view(shape))

    def __getitem__(self, index: slice | tuple[slice, ...]) -> "MasterWeights":
        return MasterWeights(self.weight[index], self.remainder[index])

    def blocks(self, num_bytes: int) -> Iterator[Tensor]:
        """The masters in order, flat float32 tensors of at most `num_bytes`."""
        parts = [each.reshape(-1).split(num_bytes // 4) for each in (self.weight, self.remainder)]
        yield from itertools.starmap(merge, zip(*parts, strict=True))

    def copy_(self, master: Tensor) -> None:
        """Sets the masters; raises KitError unless the weights are theirs."""
        self.remainder.copy_(remainders(master, self.weight))


def keep_remainders(optimizer: Any) -> None:
    """Has a DistributedOptimizer give and take float32 masters where Transformer Engine's Adam keeps remainders.

    Megatron-Core would write the int16 remainders to a checkpoint as weights.
    """
    read = optimizer._get_main_param_and_optimizer_states
    write = optimizer._set_main_param_and_optimizer_states

    def read_masters(model_param: Tensor) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = read(model_param)
        return {**tensors, "param": merge(adam_param(optimizer, model_param), tensors["param"])}

    def write_masters(model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        write(model_param, {**tensors, "param": remainders(tensors["param"], adam_param(optimizer, model_param))})

    optimizer._get_main_param_and_optimizer_states = read_masters
    optimizer._set_main_param_and_optimizer_states = write_masters
