"""What is replaced in other packages at run time."""

import sys

import numpy
import pytest

from common.engine import patches


def test_numpy_without_dtypes_has_the_one_class_that_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy.dtypes", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    patches.mend_numpy_without_dtypes()
    mended = sys.modules.pop("numpy.dtypes")
    assert mended.UInt32DType is type(numpy.dtype("uint32"))


def test_old_torch_reads_what_later_ones_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed._shard.sharded_tensor.metadata import MEM_FORMAT_ENCODING
    from torch.distributed.checkpoint import metadata

    monkeypatch.delattr(metadata, "_MEM_FORMAT_ENCODING")
    patches.mend_metadata_of_newer_torch()
    assert metadata._MEM_FORMAT_ENCODING is MEM_FORMAT_ENCODING
