"""The shim for gloo on old torch, against gloo itself where it has the operations."""

from pathlib import Path

import pytest

from common.platforms.cuda_shim import TORCH
from common.ports import free_port
from tests.distributed.launch import run

PROGRAM = """
import torch
import torch.distributed as dist
from common.platforms import gloo_shim as gloo_shim

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(rank)
for reduce in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
    given = torch.randn(3 * size, 5)
    mine, theirs, kept = torch.empty(3, 5), torch.empty(3, 5), given.clone()
    handle = gloo_shim.reduce_scatter_tensor(mine, given, op=reduce, async_op=True)
    handle.wait()
    dist.reduce_scatter_tensor(theirs, given, op=reduce)
    assert torch.equal(mine, theirs) and torch.equal(given, kept)
    part = given[3 * rank : 3 * rank + 3]  # the distributed optimizer's own place in its buffer
    gloo_shim.reduce_scatter_tensor(part, given, op=reduce)
    assert torch.equal(part, theirs)
mine, theirs = torch.empty(3 * size, 5), torch.empty(3 * size, 5)
given = torch.randn(5, 3).t()
assert gloo_shim.all_gather_into_tensor(mine, given) is None
dist.all_gather_into_tensor(theirs, given.contiguous())
assert torch.equal(mine, theirs)
mine = torch.randn(7, 5)
theirs = mine.clone()
for dtype, bound in ((torch.float32, 0.0), (torch.bfloat16, 2**-7)):  # gloo rounds bfloat16 after each rank
    mine, theirs = mine.to(dtype), theirs.to(dtype)
    gloo_shim.all_reduce(mine, async_op=True).wait()
    dist.all_reduce(theirs)
    assert mine.dtype is dtype and (mine - theirs).abs().max() <= bound * theirs.abs().max()
given = mine.to(torch.bfloat16) + rank
mine, theirs = torch.empty(7 * size, 5, dtype=torch.bfloat16), torch.empty(7 * size, 5, dtype=torch.bfloat16)
gloo_shim.all_gather_into_tensor(mine, given)
dist.all_gather_into_tensor(theirs, given)
assert torch.equal(mine, theirs)
with gloo_shim.one_by_one(None, async_ops=False) as manager:
    dist.all_reduce(mine)
manager.wait()
assert torch.equal(mine, theirs * size)
dist.destroy_process_group()
"""


@pytest.mark.skipif(TORCH < (2, 3), reason="gloo has no operation to compare with")
def test_it_gives_what_gloo_gives(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    run("-m", "torch.distributed.run", "--nproc-per-node", "3", "--master-port", str(free_port()), str(program))
