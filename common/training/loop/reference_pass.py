"""The reference's log-probabilities of all pairs, computed once, before training, in the run's own layout."""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from common.data.dataset.preference_dataset import PreferenceDataset
from common.log import logger
from common.training.checkpointing.load import load_weights
from common.training.checkpointing.state_dict import base_names
from common.training.launching.process_group import fail_together
from common.training.loop.data_loading import RankData
from common.training.loop.evaluation import evaluation_mode
from common.training.loop.forward_step import forward_backward
from common.training.loop.preference_step import log_prob_objective
from common.training.loop.train_step import any_rank
from common.training.planning.datasets import samples_at_once
from common.training.planning.plan import Plan
from common.training.planning.reference import UNKNOWN, Reference, reference_checkpoint, references_of
from common.training.state.training_state import TrainingState

LOG_INTERVAL_S = 30


def with_references(plan: Plan, training_state: TrainingState, should_stop: Callable[[], bool]) -> TrainingState | None:
    """`training_state` with the references of all pairs, which are read, or computed and stored; a collective call.

    Where they are computed, the reference's weights are in the model afterwards. None if `should_stop` on any rank.
    """
    if not plan.reference:
        return training_state
    references = references_of(plan.settings, plan.reference, [plan.train, plan.valid])
    tables = _read_on_rank_0(references)
    missing = [number for number, each in enumerate(references) if not each.is_complete(tables[number])]
    for number, each in enumerate(references):
        if number not in missing:
            logger.info("reference: the log-probabilities in %s are of these weights and data", each.paths[0].name)
    if missing:
        checkpoint = reference_checkpoint(plan.settings)
        assert checkpoint  # check_references
        load_weights(plan, training_state, checkpoint, base_names)  # new adapters add nothing yet
    for number in missing:
        computed = _compute(plan, training_state, references[number], should_stop)
        if computed is None:
            return None
        tables[number] = np.where(np.isfinite(computed), computed, tables[number])
        if dist.get_rank() == 0:
            references[number].write(tables[number])
    return replace(training_state, references=_by_pair_number(references, tables))


def _read_on_rank_0(references: list[Reference]) -> list[np.ndarray]:
    """What rank 0 finds stored, on every rank: the other nodes need not see its files."""
    box = [[each.read() for each in references] if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    assert box[0] is not None
    return box[0]


def _by_pair_number(references: list[Reference], tables: list[np.ndarray]) -> torch.Tensor:
    """float32 [all pairs, 2], on the CPU: the rows of `tables` at the pairs' numbers in the run."""
    datasets = [(dataset, table) for each, table in zip(references, tables, strict=True) for dataset in each.datasets]
    size = max(dataset.first_pair + dataset.num_pairs for dataset, _ in datasets)
    found = np.full((size, 2), UNKNOWN, np.float32)
    for dataset, table in datasets:
        pairs = dataset.pair_index.pairs
        found[dataset.first_pair + pairs] = table[pairs]
    return torch.from_numpy(found)


def _compute(
    plan: Plan, training_state: TrainingState, reference: Reference, should_stop: Callable[[], bool]
) -> np.ndarray | None:
    """float32 [pairs, 2] of `reference`, from the weights that the model has now; None if it was stopped."""
    table = np.full((reference.num_pairs, 2), UNKNOWN, np.float32)
    for dataset in reference.datasets:
        found = reference_pass(plan, training_state, dataset, should_stop)
        if found is None:
            return None
        table = np.maximum(table, found)
    if not reference.is_complete(table):
        fail_together(
            f"the reference's log-probabilities of {reference.datasets[0].tokens.prefix} are not finite: its weights"
            " are damaged, or the wrong ones (`python -m common.convert verify`)"
        )
    return table


def reference_pass(
    plan: Plan, training_state: TrainingState, dataset: PreferenceDataset, should_stop: Callable[[], bool]
) -> np.ndarray | None:
    """float32 [pairs, 2]: the log-probabilities of `dataset` under the model's weights, UNKNOWN for other pairs.

    Every rank takes part, and gets all of them. None if `should_stop` on any rank.
    """
    settings, name = plan.settings, dataset.tokens.prefix.name
    at_once = samples_at_once(settings)
    data_iterators = RankData(plan, dataset, global_batch_size=at_once).read_from(0, training_state)
    per_call = settings.pp if settings.vpp > 1 else 1  # micro-batches of a rank for `at_once` samples
    left = total = -(-dataset.samples_per_epoch // at_once)
    device = torch.device(plan.platform.device)
    table = torch.full((dataset.num_pairs, 2), UNKNOWN, dtype=torch.float32)
    logger.info("reference: computing the log-probabilities of %d pairs of %s", dataset.pair_index.pairs.size, name)
    began = logged = time.monotonic()
    with evaluation_mode(training_state):
        while left:
            number = min(left, max(1, plan.num_microbatches // per_call))
            for pairs, log_probs in forward_backward(
                plan, training_state, data_iterators,
                forward_only=True, num_microbatches=number * per_call, objective=log_prob_objective,
            ):  # fmt: skip
                table[pairs - dataset.first_pair] = log_probs
            left -= number
            if any_rank(should_stop(), device):
                return None
            if (now := time.monotonic()) - logged >= LOG_INTERVAL_S:
                logged, rest = now, timedelta(seconds=round((now - began) * left / (total - left)))
                logger.info("reference: %.1f%% of %s, %s left", 100 * (1 - left / total), name, rest)
    table = table.to(device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)  # each rank has some, and -inf for the others
    logger.info("reference: %s done in %.1f s", name, time.monotonic() - began)
    found: np.ndarray = table.cpu().numpy()
    return found
