"""Pickles that would run code are refused by name; what real checkpoints hold is read without importing it."""

import datetime
import operator
import os
import pickle
import re
import signal
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from megatron.core.enums import ModelType
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.enums import AttnBackend

from common.checkpoint.formats.torch_archive import ArchiveFile, write_archive
from common.checkpoint.untrusted.placeholders import Inert
from common.checkpoint.untrusted.restricted_unpickler import RestrictedUnpickler
from common.errors import KitError
from tests.unit.checkpoint.opcodes import Runs, call, named, pickled, word

FILE = Path("folder/model_optim_rng.pt")


def load(data: bytes, foreign: bool = False) -> Any:
    return RestrictedUnpickler(data, FILE, foreign=foreign).load()


def called(module: str, name: str, *arguments: str) -> bytes:
    """A pickle that calls module.name with words."""
    return pickled(call(named(module, name), *map(word, arguments)))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("nt", "system"),
        ("subprocess", "Popen"),
        ("subprocess", "check_output"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("builtins", "compile"),
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("builtins", "open"),
        ("builtins", "str.format"),
        ("__builtin__", "apply"),
        ("runpy", "run_path"),
        ("importlib", "import_module"),
        ("functools", "partial"),
        ("operator", "attrgetter"),
        ("codecs", "decode"),
        ("_codecs", "decode"),
        ("shutil", "rmtree"),
        ("pickle", "loads"),
        ("types", "FunctionType"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("torch.hub", "load"),
        ("torch.jit", "load"),
        ("torch", "ops.load_library"),
        ("torch", "storage.os.system"),
        ("torch", "os.x.Storage"),
        ("torch.storage", "_load_from_bytes"),
        ("torch.storage", "UntypedStorage.from_file"),
        ("torch._utils", "_import_dotted_name"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch._dynamo.utils", "exec"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.filesystem", "os.system"),
        ("collections", "OrderedDict.fromkeys"),
        ("argparse", "FileType"),
        ("numpy", "load"),
        ("numpy", "f2py.os.system"),
        ("numpy.core.multiarray", "fromfile"),
        ("numpy.testing._private.utils", "runstring"),
        ("megatronic", "run"),
        ("apexlike.x", "run"),
        ("", "eval"),
    ],
)
def test_a_global_that_could_run_code_is_refused_by_its_name(module: str, name: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    with pytest.raises(KitError, match="was not loaded") as caught:
        load(called(module, name, f"touch {marker}"))
    with pytest.raises(KitError, match="was not loaded"):
        load(called(module, name, f"touch {marker}"), foreign=True)
    assert str(caught.value).startswith(f"{FILE} references {module}.{name}, which") and not marker.exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_no_pickle_protocol_bypasses_the_check(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    value = {"a": [1], "x": Runs(eval, f"open({str(marker)!r}, 'w')")}
    with pytest.raises(KitError, match=r"references (__builtin__|builtins)\.eval"):
        load(pickle.dumps(value, protocol))
    assert not marker.exists()
    pickle.loads(pickle.dumps(value, protocol))  # it would have
    assert marker.exists()


def test_the_protocol_of_text_is_refused() -> None:
    with pytest.raises(KitError, match="uses the pickle opcode [A-Z]+, which no checkpoint writer uses"):
        load(pickle.dumps([1000, 2.5, "a"], 0))


def test_a_lambda_and_a_class_of_the_users_own_are_refused() -> None:
    with pytest.raises(KitError, match=r"references operator\.methodcaller"):
        load(pickle.dumps(Runs(operator.methodcaller("upper"), "a")))
    with pytest.raises(KitError, match=r"references .*opcodes\.Runs"):
        load(pickle.dumps(Runs))


def test_a_checkpoint_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path, marker = tmp_path / "model_optim_rng.pt", tmp_path / "ran"
    torch.save({"model": {"a": torch.ones(2)}, "args": Runs(os.system, f"touch {marker}")}, path)
    with pytest.raises(KitError, match=r"model_optim_rng\.pt references posix\.system"):
        ArchiveFile(path).read()
    with path.open("wb") as stream:
        write_archive(stream, {"args": Runs(os.system, f"touch {marker}")})
    with pytest.raises(KitError, match=r"model_optim_rng\.pt references posix\.system"):
        ArchiveFile(path).read()
    assert not marker.exists()


def test_text_is_encoded_as_latin1_alone() -> None:
    assert load(pickle.dumps(b"\x00\xff\x80", 2)) == b"\x00\xff\x80"
    with pytest.raises(KitError, match=r"calls _codecs\.encode with arguments that the pickler does not write"):
        load(called("_codecs", "encode", "text", "rot13"))


@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_values_are_read_as_they_are(protocol: int) -> None:
    values = [
        Namespace(a=1, b=[None, 2.5]),
        OrderedDict(a=1),
        defaultdict(list, {"a": [1]}),
        Counter("aab"),
        {"set": {1, 2}, "frozen": frozenset([3])},
        torch.bfloat16,
        torch.Size([2, 3]),
        torch.device("cpu"),
        torch.__version__,
        slice(1, 2),
    ]
    loaded = load(pickle.dumps(values, protocol))
    assert loaded == values and [type(one) for one in loaded] == [type(one) for one in values]


@pytest.mark.parametrize("package", ["numpy.core", "numpy._core"])
def test_what_any_numpy_wrote_any_numpy_reads(package: str) -> None:
    state = [numpy.random.default_rng(0).integers(0, 1 << 32, 624, numpy.uint32), numpy.float64(1.5), numpy.bool_(True)]
    data = pickle.dumps(state, 2)
    assert re.search(rb"cnumpy\._?core\.", data)  # numpy 2's, or an older one's
    array, number, flag = load(re.sub(rb"cnumpy\._?core\.", f"c{package}.".encode(), data))
    assert type(array) is numpy.ndarray and array.dtype == numpy.uint32 and (array == state[0]).all()
    assert type(number) is numpy.float64 and number == 1.5 and flag == numpy.bool_(True)


@pytest.mark.lane
@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("written", [b"csignal\nSIGTERM\n", b"csignal\nSignals\nK\x0f\x85R"], ids=["3.10", "later"])
def test_a_signal_that_any_python_wrote_is_read_as_an_inert_value(written: bytes, foreign: bool) -> None:
    for data in (b"\x80\x02" + written + b".", pickle.dumps(signal.SIGTERM, 2)):
        assert pickle.loads(data) is signal.SIGTERM
        value = load(data, foreign)
        assert isinstance(value, Inert) and repr(value) == "Signals(15,)"


@pytest.mark.parametrize("name", ["signal", "SIG_DFL", "SIGNONE"])
def test_of_the_module_signal_nothing_else_is_read(name: str) -> None:
    with pytest.raises(KitError, match=f"references signal.{name}, "):
        load(pickled(named("signal", name)))


def test_megatrons_arguments_are_read_as_inert_values() -> None:
    arguments = Namespace(
        num_layers=4,
        params_dtype=torch.bfloat16,
        encoder_or_decoder=ModelType.encoder_or_decoder,
        attention_backend=AttnBackend.auto,
        activation=torch.nn.functional.gelu,
        save=Path("/checkpoints"),
        timeout=datetime.timedelta(minutes=10),
        config=ModelParallelConfig(tensor_model_parallel_size=2),
    )
    loaded = load(pickle.dumps({"args": arguments}, 2), foreign=True)["args"]
    assert (loaded.num_layers, loaded.params_dtype) == (4, torch.bfloat16)
    made = {name for name, value in vars(loaded).items() if isinstance(value, Inert)}
    assert made == {"encoder_or_decoder", "attention_backend", "save", "timeout", "config"}
    assert repr(loaded.encoder_or_decoder) == "ModelType(1,)"
    assert loaded.attention_backend.args == (AttnBackend.auto.value,)
    assert loaded.config.state["tensor_model_parallel_size"] == 2
    assert issubclass(loaded.activation, Inert)
    assert "ModelParallelConfig()" in repr(loaded)


def test_what_megatron_names_is_not_imported() -> None:
    made = load(called("megatron.of.tomorrow", "Kind", "a"), foreign=True)
    assert repr(made) == "Kind('a',)" and type(made).__module__ == "megatron.of.tomorrow"


def test_what_others_read_too_names_known_classes_alone() -> None:
    known = Namespace(a=ModelType.encoder_or_decoder, b=AttnBackend.auto, c=Path("/a"), d=signal.SIGTERM)
    assert repr(load(pickle.dumps(known)).a) == "ModelType(1,)"
    remedy = "from a source you trust, or convert it to Hugging Face and back with step 2, which drops it"
    for module, name in (("megatron.core.utils", "os.system"), ("megatron.of.tomorrow", "Kind"), ("apex.a", "b")):
        with pytest.raises(KitError, match=f"references {module}.{name}, .* {remedy}"):
            load(called(module, name, "a"))
