"""The path of a rank's data, from the datasets to the loss of a micro-batch.

    planning/datasets.py    open_data      DATASET_PATH to `Plan.train` and `Plan.valid`, each a SampleDataset
    data_loading.py         DataLoaders    samples to this rank's micro-batches, read ahead by worker processes
    batch.py                prepare_batch  a micro-batch to tensors on the device, and the arguments of attention
    forward_step.py         forward_step   a batch to its loss: of tokens, or of pairs (preference_step.py)

Training and evaluation take the same path, and so does the reference of preferences (reference_pass.py).
"""

import os
from collections.abc import Iterator

from common.data.dataset.data_loader import Batch, MicroBatchLoader
from common.data.dataset.sample_dataset import SampleDataset
from common.training.planning.plan import Plan


class DataLoaders:
    """This rank's training and validation data; their workers are forked here, so before CUDA is initialized."""

    def __init__(self, plan: Plan) -> None:
        assert plan.train
        self.num_chunks = plan.sizes.vpp
        self.train = build_data_loader(plan, plan.train, plan.progress.consumed_samples)
        self.valid = build_data_loader(plan, plan.valid, 0) if plan.valid and plan.settings.eval_interval else None

    def train_iterators(self, consumed_samples: int) -> list[Iterator[Batch]]:
        """The training micro-batches from `consumed_samples` on: a data iterator per virtual pipeline chunk."""
        return self.train.read_from(consumed_samples, self.num_chunks)

    def valid_iterators(self) -> list[Iterator[Batch]]:
        """The validation micro-batches from the first on: a data iterator per virtual pipeline chunk."""
        assert self.valid
        return self.valid.read_from(0, self.num_chunks)


def build_data_loader(plan: Plan, samples: SampleDataset, start_sample: int) -> MicroBatchLoader:
    """This rank's endless micro-batches of `samples` from `start_sample` on."""
    settings = plan.settings
    return MicroBatchLoader(
        samples,
        start_sample=start_sample,
        global_batch_size=settings.global_batch_size,
        micro_batch_size=settings.micro_batch_size,
        dp_rank=plan.sizes.dp_rank(int(os.environ["RANK"])),
        dp_size=plan.sizes.dp,
        num_workers=settings.num_workers,
    )
