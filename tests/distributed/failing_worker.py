"""`python -m common.train`, whose rank 1 asks for more memory than there is in its third step.

Rank 0 has logged the first by then, since the second needs both, and waits for rank 1 in a collective; destroying
the process groups blocks forever, as NCCL does then.
"""

import time
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from common import errors, train
from common.training.loop import trainer


def main() -> None:
    """Trains till then."""
    steps, train_step = 0, trainer.train_step

    def failing(*given: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3 and dist.get_rank() == 1:
            torch.empty(2**60)
        return train_step(*given)

    with (
        patch.object(trainer, "train_step", failing),
        patch.object(dist, "destroy_process_group", lambda: time.sleep(600)),
    ):
        errors.run(train.main)


if __name__ == "__main__":
    main()
