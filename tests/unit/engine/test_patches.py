"""What is replaced in other packages at run time."""

import importlib
import inspect
import re
import sys
from typing import Any

import numpy
import pytest

from common.engine import patches
from common.engine.versions import version


def test_numpy_without_dtypes_has_the_one_class_that_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy.dtypes", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    patches.mend_numpy_without_dtypes()
    mended = sys.modules.pop("numpy.dtypes")
    assert mended.UInt32DType is type(numpy.dtype("uint32"))


def test_old_torch_reads_what_later_ones_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed._shard.sharded_tensor.metadata import MEM_FORMAT_ENCODING
    from torch.distributed.checkpoint import metadata

    monkeypatch.delattr(metadata, "_MEM_FORMAT_ENCODING", raising=False)
    patches.mend_metadata_of_newer_torch()
    assert metadata._MEM_FORMAT_ENCODING is MEM_FORMAT_ENCODING


# What is replaced, and where the installed Megatron-Core looks it up: a patch that nothing reads would do nothing.
PLACES = [
    ("megatron.core.tensor_parallel.layers", "_grad_accum_fusion_available", "ColumnParallelLinear.__init__"),
    ("megatron.core.models.common.embeddings.rope_utils", "_apply_rotary_pos_emb_bshd", "apply_rotary_pos_emb"),
    ("megatron.core.transformer.mlp", "bias_swiglu_impl", "MLP.forward"),
    (
        "megatron.core.optimizer.distrib_optimizer",
        "_set_main_param_and_optimizer_states",
        "DistributedOptimizer.load_parameter_state_from_dp_zero",
    ),
]
if version() >= patches.SINGLE_QKV_ROPE_SINCE:
    PLACES += [
        ("megatron.core.transformer.attention", "apply_fused_qkv_rotary_pos_emb", "Attention.forward"),
        ("megatron.core.transformer.attention", "HAVE_FUSED_QKV_ROPE", "Attention.forward"),
    ]
if version() == (0, 11):
    PLACES += [
        (
            "megatron.core.tensor_parallel.layers",
            "prepare_input_tensors_for_wgrad_compute",
            "LinearWithGradAccumulationAndAsyncCommunication.backward",
        )
    ]


@pytest.mark.lane
@pytest.mark.parametrize(("module", "name", "reader"), PLACES)
def test_what_is_replaced_is_read_by_the_installed_version(module: str, name: str, reader: str) -> None:
    patches.mend_numpy_without_dtypes()
    found: Any = importlib.import_module(module)
    for part in reader.split("."):
        found = getattr(found, part)
    assert name in inspect.getsource(found)


def test_every_patch_of_megatron_core_is_in_the_table() -> None:
    """Each attribute of a module or class of Megatron-Core that patches.py assigns."""
    source = inspect.getsource(patches)
    assigned = set(re.findall(r"^ +(?:layers|rope_utils|mlp|attention|DistributedOptimizer)\.(\w+) = ", source, re.M))
    own = {"load_state_dict"}  # called by Megatron-Core's users, such as the kit
    assert assigned - own <= {name for _, name, _ in PLACES} | {"prepare_input_tensors_for_wgrad_compute"} | {
        "apply_fused_qkv_rotary_pos_emb", "HAVE_FUSED_QKV_ROPE",
    }  # fmt: skip
    assert len(assigned) > 4
