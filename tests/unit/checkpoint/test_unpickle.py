"""Pickles that would run code are refused by name; what stands in real checkpoints is read without importing it."""

import datetime
import io
import operator
import os
import pickle
import sys
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

from common.checkpoint.archive import MappedFile, write_archive
from common.checkpoint.unpickle import Inert, RestrictedUnpickler
from common.errors import KitError

FILE = Path("folder/model_optim_rng.pt")


def load(data: bytes) -> Any:
    return RestrictedUnpickler(io.BytesIO(data), FILE).load()


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def call(module: str, name: str, *arguments: str) -> bytes:
    """A pickle that calls module.name, whatever the name is: dots in it are looked up one by one."""
    return b"\x80\x04" + text(module) + text(name) + b"\x93(" + b"".join(map(text, arguments)) + b"tR."


class Runs:
    """Is made again by calling `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made_by = (function, arguments)

    def __reduce__(self) -> Any:
        return self.made_by


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
    proof = tmp_path / "ran"
    with pytest.raises(KitError, match="was not loaded") as caught:
        load(call(module, name, f"touch {proof}"))
    assert str(caught.value).startswith(f"{FILE} asks for {module}.{name}, which") and not proof.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_protocol_gets_by(protocol: int, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    value = {"a": [1], "x": Runs(eval, f"open({str(proof)!r}, 'w')")}
    with pytest.raises(KitError, match=r"asks for (__builtin__|builtins)\.eval"):
        load(pickle.dumps(value, protocol))
    assert not proof.exists()
    pickle.loads(pickle.dumps(value, protocol))  # it would have
    assert proof.exists()


def test_a_lambda_and_a_class_of_the_users_own_are_refused() -> None:
    with pytest.raises(KitError, match=r"asks for operator\.methodcaller"):
        load(pickle.dumps(Runs(operator.methodcaller("upper"), "a")))
    with pytest.raises(KitError, match=r"asks for .*test_unpickle\.Runs"):
        load(pickle.dumps(Runs))


def test_a_checkpoint_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path, proof = tmp_path / "model_optim_rng.pt", tmp_path / "ran"
    torch.save({"model": {"a": torch.ones(2)}, "args": Runs(os.system, f"touch {proof}")}, path)
    with pytest.raises(KitError, match=r"model_optim_rng\.pt asks for posix\.system"):
        MappedFile(path).read()
    with path.open("wb") as stream:
        write_archive(stream, {"args": Runs(os.system, f"touch {proof}")})
    with pytest.raises(KitError, match=r"model_optim_rng\.pt asks for posix\.system"):
        MappedFile(path).read()
    assert not proof.exists()


def test_text_is_encoded_as_latin1_alone() -> None:
    assert load(pickle.dumps(b"\x00\xff\x80", 2)) == b"\x00\xff\x80"
    with pytest.raises(KitError, match="asks to encode text as 'rot13'"):
        load(call("_codecs", "encode", "text", "rot13"))


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
@pytest.mark.parametrize("old", [False, True])
def test_what_any_numpy_wrote_any_numpy_reads(package: str, old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if old:  # before 1.26 there is no numpy._core
        monkeypatch.setitem(sys.modules, "numpy._core.multiarray", None)
        monkeypatch.delattr(numpy, "_core", raising=False)
    found = load(f"c{package}.multiarray\n_reconstruct\n.".encode())
    assert callable(found) and found.__name__ == "_reconstruct"


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
    loaded = load(pickle.dumps({"args": arguments}, 2))["args"]
    assert (loaded.num_layers, loaded.params_dtype) == (4, torch.bfloat16)
    made = {name for name, value in vars(loaded).items() if isinstance(value, Inert)}
    assert made == {"encoder_or_decoder", "attention_backend", "save", "timeout", "config"}
    assert repr(loaded.encoder_or_decoder) == "ModelType(1,)"
    assert loaded.attention_backend.args == (AttnBackend.auto.value,)
    assert loaded.config.state["tensor_model_parallel_size"] == 2
    assert issubclass(loaded.activation, Inert)
    assert "ModelParallelConfig()" in repr(loaded)


def test_what_megatron_names_is_not_imported() -> None:
    made = load(call("megatron.of.tomorrow", "Kind", "a"))
    assert repr(made) == "Kind('a',)" and type(made).__module__ == "megatron.of.tomorrow"
