"""The path of a rank's data, from the datasets to the loss of a micro-batch.

    planning/datasets.py    open_data      DATASET_PATH to `Plan.train` and `Plan.valid`, each a SampleDataset
    data_loading.py         DataLoaders    samples to this rank's micro-batches, read ahead by worker processes
    tp_broadcast.py         send_each      a micro-batch to the other ranks of the tensor-parallel group
    batch.py                prepare_batch  a micro-batch to tensors on the device, and the arguments of attention
    forward_step.py         forward_step   a batch to its loss: of tokens, or of pairs (preference_step.py)

Training and evaluation take the same path, and so does the reference of preferences (reference_pass.py).
"""

import os
from collections.abc import Iterator
from itertools import tee

from common.data.dataset.data_loader import Batch, MicroBatchLoader
from common.data.dataset.sample_dataset import SampleDataset
from common.training.loop.tp_broadcast import receive_each, send_each
from common.training.planning.plan import Plan
from common.training.state.training_state import TrainingState

ATTENTION_FIELDS = frozenset({"segment_ids"})
FIRST_STAGE_FIELDS = frozenset({"tokens"})
LAST_STAGE_FIELDS = frozenset({"labels", "loss_mask", "num_padding", "pairs"})


class DataLoaders:
    """This rank's training and validation data; their workers are forked here, so before CUDA is initialized."""

    def __init__(self, plan: Plan) -> None:
        assert plan.train
        workers = plan.settings.num_workers
        self.train = RankData(plan, plan.train, plan.progress.consumed_samples, workers)
        self.valid = RankData(plan, plan.valid, 0, workers) if plan.valid and plan.settings.eval_interval else None

    def train_iterators(self, consumed_samples: int, training_state: TrainingState) -> list[Iterator[Batch]]:
        """The training micro-batches from `consumed_samples` on: a data iterator per virtual pipeline chunk."""
        return self.train.read_from(consumed_samples, training_state)

    def valid_iterators(self, training_state: TrainingState) -> list[Iterator[Batch]]:
        """The validation micro-batches from the first on: a data iterator per virtual pipeline chunk."""
        assert self.valid
        return self.valid.read_from(0, training_state)


class RankData:
    """This rank's endless micro-batches of some samples, with the entries that its virtual pipeline chunks use.

    They are read where the rank is the first of its tensor-parallel group, and else received from that one. Chunks that
    use none get empty micro-batches; a rank with no other chunk neither reads nor receives.
    """

    def __init__(
        self,
        plan: Plan,
        samples: SampleDataset,
        start_sample: int = 0,
        num_workers: int = 0,
        global_batch_size: int | None = None,
    ) -> None:
        rank, settings = int(os.environ["RANK"]), plan.settings
        self.fields = [fields_of_chunk(plan, plan.sizes.pp_rank(rank), chunk) for chunk in range(plan.sizes.vpp)]
        self.reader = plan.sizes.tp_group(rank)[0]
        self._loader: MicroBatchLoader | None = None
        if any(self.fields) and rank == self.reader:
            self._loader = MicroBatchLoader(
                samples,
                start_sample=start_sample,
                global_batch_size=global_batch_size or settings.global_batch_size,
                micro_batch_size=settings.micro_batch_size,
                dp_rank=plan.sizes.dp_rank(rank),
                dp_size=plan.sizes.dp,
                num_workers=num_workers,
                fields=frozenset().union(*self.fields),
            )

    def read_from(self, start_sample: int, training_state: TrainingState) -> list[Iterator[Batch]]:
        """The micro-batches from `start_sample` on, an iterator per chunk; ends the previous ones.

        What one chunk of the rank has read, the others get without reading again.
        """
        readers = iter(tee(self._batches(start_sample, training_state), len(self.fields)))
        return [_with_fields(next(readers), fields) if fields else iter(dict, None) for fields in self.fields]

    def _batches(self, start_sample: int, training_state: TrainingState) -> Iterator[Batch]:
        group = training_state.data_group
        if not self._loader:
            return receive_each(self.reader, group, training_state.heartbeat)
        batches = self._loader.read_from(start_sample)
        return send_each(batches, group) if group else batches


def fields_of_chunk(plan: Plan, stage: int, chunk: int) -> frozenset[str]:
    """The entries of a sample that virtual pipeline chunk `chunk` of pipeline stage `stage` uses."""
    sizes, settings = plan.sizes, plan.settings
    fields = ATTENTION_FIELDS if settings.packing or settings.reset_attention else frozenset()
    if (stage, chunk) == (0, 0):
        fields |= FIRST_STAGE_FIELDS
    if (stage, chunk) == (sizes.pp - 1, sizes.vpp - 1):
        fields |= LAST_STAGE_FIELDS
    return fields


def _with_fields(batches: Iterator[Batch], fields: frozenset[str]) -> Iterator[Batch]:
    """Micro-batches of their own, from which entries may be removed, with `fields` alone."""
    for batch in batches:
        yield {name: tensor for name, tensor in batch.items() if name in fields}
