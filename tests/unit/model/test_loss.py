"""The fused output layer and loss against PyTorch's own cross-entropy, in one process and over two."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.model.layers.loss import LinearCrossEntropy, RecomputedCrossEntropy, TorchKernels, Vocabulary
from common.model.shape import chunks


def case(num_tokens: int = 50, rows: int = 50) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(700, 16, generator=generator, requires_grad=True)
    weight = torch.zeros(rows, 16)
    weight[:num_tokens] = torch.randn(num_tokens, 16, generator=generator)
    labels = torch.randint(0, num_tokens, (700,), generator=generator)
    weights = torch.rand(700, generator=generator) * (torch.rand(700, generator=generator) < 0.7)
    return hidden, weight.requires_grad_(), labels, weights


def expected(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> list[torch.Tensor]:
    losses = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="none") * weights
    return [losses, *torch.autograd.grad((3 * losses).sum(), [hidden, weight])]


def test_losses_and_gradients_are_those_of_cross_entropy_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "MAX_LOGITS_BYTES", 256 * 50 * 4)
    inputs = case()
    losses = LinearCrossEntropy.apply(*inputs, Vocabulary(None, 0, 50), TorchKernels(), True)
    gradients = torch.autograd.grad((3 * losses).sum(), inputs[:2])
    for mine, theirs in zip([losses, *gradients], expected(*inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_gradients_of_any_upstream_gradient_are_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "MAX_LOGITS_BYTES", 256 * 52 * 4)
    hidden, weight, labels, weights = case(num_tokens=50, rows=52)
    upstream = torch.randn(700, generator=torch.Generator().manual_seed(4))
    losses = RecomputedCrossEntropy.apply(
        hidden, weight, labels, weights, Vocabulary(None, 0, 50), TorchKernels(), True
    )
    mine = [losses, *torch.autograd.grad(losses, [hidden, weight], upstream)]
    theirs = torch.nn.functional.cross_entropy(hidden @ weight[:50].t(), labels, reduction="none") * weights
    gradients = torch.autograd.grad(theirs, [hidden, weight], upstream)
    for found, reference in zip(mine, [theirs, *gradients], strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-5)
    assert not mine[2][50:].any()


@pytest.mark.parametrize(
    ("tokens", "chunk"), [(1, 256), (3328, 3328), (3329, 1792), (4096, 2048), (3 * 3328, 3328), (65536, 3328)]
)
def test_chunks_are_as_few_and_as_even_as_possible(tokens: int, chunk: int) -> None:
    """Qwen2.5's vocabulary in bfloat16: at most 3,328 tokens make 1 GiB of logits."""
    assert chunks.chunk_size(tokens, 151936 * 2) == chunk


def test_rows_that_pad_the_vocabulary_have_no_part_in_the_softmax() -> None:
    hidden, weight, labels, weights = case(num_tokens=50, rows=52)
    losses = LinearCrossEntropy.apply(hidden, weight, labels, weights, Vocabulary(None, 0, 50), TorchKernels(), True)
    gradient = torch.autograd.grad(losses.sum(), weight)[0]
    torch.testing.assert_close(losses, expected(hidden, weight[:50], labels, weights)[0], rtol=1e-5, atol=1e-5)
    assert not gradient[50:].any() and gradient[:50].any()


@pytest.mark.parametrize("cross_entropy", [LinearCrossEntropy, RecomputedCrossEntropy])
def test_the_gradient_of_the_weight_goes_to_its_buffer_and_zeros_to_autograd_where_more_is_to_come(
    cross_entropy: type[torch.autograd.Function],
) -> None:
    hidden, weight, labels, weights = case()
    weight.main_grad = torch.ones_like(weight)
    weight.zero_out_wgrad = True
    cross_entropy.apply(hidden, weight, labels, weights, Vocabulary(None, 0, 50), TorchKernels(), True).sum().backward()
    theirs = expected(hidden, weight, labels, weights)[2] / 3
    torch.testing.assert_close(weight.main_grad, 1 + theirs, rtol=1e-5, atol=1e-5)
    assert weight.grad_added_to_main_grad and weight.grad is not None and not weight.grad.any()


def test_without_gradients_only_losses_are_made() -> None:
    inputs = case()
    with torch.no_grad():
        losses = LinearCrossEntropy.apply(*inputs, Vocabulary(None, 0, 50), TorchKernels(), False)
    torch.testing.assert_close(losses, expected(*inputs)[0], rtol=1e-5, atol=1e-5)


PROGRAM = """
import json, sys, torch, torch.distributed as dist
from common.engine.patches import add_numpy_dtypes
add_numpy_dtypes()
from common.model.layers.loss import LinearCrossEntropy, RecomputedCrossEntropy, TorchKernels, Vocabulary
from common.training.launching.rank_exit import exit_now
from tests.unit.model.test_loss import case, expected
dist.init_process_group("gloo")
rank = dist.get_rank()
hidden, weight, labels, weights = case(num_tokens=51, rows=52)
mine = weight[26 * rank : 26 * rank + 26].detach().requires_grad_()
vocabulary = Vocabulary(dist.group.WORLD, 26 * rank, min(51 - 26 * rank, 26))
theirs = expected(hidden, weight[:51], labels, weights)
for cross_entropy in (LinearCrossEntropy, RecomputedCrossEntropy):
    losses = cross_entropy.apply(hidden, mine, labels, weights, vocabulary, TorchKernels(), True)
    d_hidden, d_weight = torch.autograd.grad((3 * losses).sum(), [hidden, mine])
    dist.all_reduce(d_hidden)
    torch.testing.assert_close(losses, theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_hidden, theirs[1], rtol=1e-5, atol=1e-5)
    rows = theirs[2][26 * rank : 26 * rank + 26]
    torch.testing.assert_close(d_weight[: vocabulary.num_tokens], rows, rtol=1e-5, atol=1e-5)
    assert not d_weight[vocabulary.num_tokens :].any()
print(json.dumps({"ok": rank}))
dist.barrier()  # gloo may abort when the other rank exits first
dist.destroy_process_group()
exit_now(0)
"""


def test_two_tensor_parallel_ranks_give_the_same(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(root), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # The two may print at once, on one line.
    assert sorted(re.findall(r'{"ok": (\d)}', done.stdout)) == ["0", "1"]
