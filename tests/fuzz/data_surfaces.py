"""Readers of rows and data, as in step 1 and training; each takes the bytes of one case.

What is read must be right too: an AssertionError escapes where another reader gets something else from the bytes.
"""

import gzip as gzip_file
import json
import struct
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from backports import zstd as zstd_file
from safetensors.torch import load, save_file
from tokenizers import AddedToken

from common.checkpoint.conversion.state_dict_adapter import hf_shapes
from common.checkpoint.formats.hf_folder import INDEX, SINGLE, HfReader, check_weights
from common.data.dataset.id_range import scan_id_range
from common.data.dataset.indexed_dataset import IndexedDataset, IndexedDatasetBuilder, bin_path, idx_path, open_tokens
from common.data.encoders.sft import SftEncoder
from common.data.sources.bad_rows import BadRows
from common.data.sources.chunks import Chunk, read_chunks
from common.data.sources.file_format import detect_layout
from common.data.sources.jsonl import fast_string_column, first_rows, records
from common.data.sources.spans import Span
from common.data.templates.assistant_spans import RESTORED_REASONING
from common.data.templates.chat_template import ChatTemplate
from common.data.tokenizer.eod import find_eod
from common.data.tokenizer.text_tokenizer import load_tokenizer
from common.demo.tokenizer import train_tokenizer
from tests.fuzz import files
from tests.fuzz import rows as row_cases
from tests.fuzz.bounds import ROOT, Case, Surface
from tests.unit.checkpoint.small import bitwise_equal, write_hf

MANY = 2000  # rows; more are a file that inflates to many, which are read in chunks alone
BOM = b"\xef\xbb\xbf"
CHAT = ROOT / "tests/unit/data/templates"
ADDED = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")


def rows(folder: Path, seed: int, count: int) -> tuple[Iterator[bytes], Case]:
    """Fine-tuning rows by the templates of Qwen2.5 and Qwen3."""
    made = {name: _tokenizer(folder / name, name) for name in row_cases.TEMPLATES}

    @cache
    def encoder(name: str, turns: str, on: str, weights: str, roles: str, kind: str) -> SftEncoder:
        tokenizer, template = made[name]
        return SftEncoder(
            tokenizer, template, kind, roles, on, turns, find_eod(tokenizer, "auto"), weighted=weights == "weighted"
        )

    def take(data: bytes) -> None:
        how, _, text = data.partition(b"\n")
        kind = next((each for each in ("messages", "conversations") if each.encode() in text), "instruction")
        path = folder / "rows.jsonl"
        path.write_bytes(text)
        check_padding_rows(encoder(*how.decode().split(), kind), Chunk(path, 0, text, len(text)))

    return row_cases.cases(seed, count), take


def _tokenizer(folder: Path, name: str) -> tuple[Any, ChatTemplate]:
    folder.mkdir()
    made = train_tokenizer(["the cat sat\n\n\non the mat\n\n and said hello\n world 你好 世界 "] * 4, 330)
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text((CHAT / f"{name}.jinja").read_text())
    tokenizer = load_tokenizer(folder)
    return tokenizer, ChatTemplate(tokenizer)


def check_padding_rows(encoder: SftEncoder, chunk: Chunk) -> None:
    """Encodes rows; they must have ids of the vocabulary, finite weights, and the text of transformers' rendering."""
    encoded = encoder(chunk)
    tokens, mask = encoded.streams["tokens"], encoded.streams["loss_mask"]
    assert tokens.size == mask.size == encoded.lengths.sum() and mask.dtype == encoder.mask_dtype
    assert int(tokens.max(initial=0)) < encoder.tokenizer.vocab_size
    assert np.isfinite(mask).all() and (mask >= 0).all()
    ends = np.cumsum(encoded.lengths).tolist()
    talks = [encoder.conversation(row) for _, row in records(chunk, Counter())]
    assert len(talks) == len(ends)
    for conversation, end, length in zip(talks, ends, encoded.lengths.tolist(), strict=True):
        assert mask[end - length : end].any() and mask[end - 1] == 0
        text = encoder.tokenizer.decode(tokens[end - length : end - 1].tolist())
        # As transformers renders it; the tokenizer is the encoder's own, given the same words.
        render, more = encoder.template._tokenizer.apply_chat_template, conversation.template_kwargs
        if encoded.counts[
            RESTORED_REASONING
        ]:  # the last answer is as the model generates it, not as the template shows it later
            prompt = render(
                conversation.messages[:-1], tools=conversation.tools, tokenize=False, add_generation_prompt=True, **more
            )
            assert _nfc(text).startswith(_nfc(prompt)), (text, prompt)
            continue
        expected = render(conversation.messages, tools=conversation.tools, tokenize=False, **more)
        assert _nfc(text) == _nfc(expected), (text, expected)


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def jsonl(folder: Path, seed: int, count: int) -> tuple[Iterator[bytes], Case]:
    """Lines of jsonl."""
    path = folder / "rows.jsonl"

    def take(data: bytes) -> None:
        found = _read_case(path, data)
        layout = detect_layout(path)
        if not layout.array and not layout.compression:
            _check_lines(found, data)

    return files.jsonl_cases(seed, count), take


def _check_lines(found: list[Any], data: bytes) -> None:
    lines = [line for line in data.removeprefix(BOM).split(b"\n") if line.strip()]
    _check_same(found, [json.loads(line.decode("utf-8")) for line in lines])


def read_rows(path: Path) -> list[Any]:
    """The rows of a file, read one by one and in chunks, which must be the same; raises KitError."""
    found = [row for _, _, row in first_rows([path])]
    again = []
    for chunk in read_chunks(Span(path, 0, None if detect_layout(path).sequential else path.stat().st_size), 1 << 20):
        part = [row for _, row in records(chunk, Counter(), BadRows(chunk))]
        fast = fast_string_column(chunk, "text")
        assert fast is None or fast == [row.get("text") for row in part]
        again += part
    _check_same(found, again)
    return found


def _check_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected), (len(found), len(expected))
    for one, other in zip(found, expected, strict=True):
        # Text, since NaN is not itself, and 1 is True and 1.0.
        assert one == other and json.dumps(one) == json.dumps(other) or repr(one) == repr(other), (one, other)


def json_array(folder: Path, seed: int, count: int) -> tuple[Iterator[bytes], Case]:
    """One JSON array of rows."""
    path = folder / "rows.json"

    return files.json_array_cases(seed, count), lambda data: _read_case(path, data)


def _read_case(path: Path, data: bytes) -> list[Any]:
    """The rows of `data`, written to `path`; those of a JSON array are compared with Python's own reader."""
    path.write_bytes(data)
    found = read_rows(path)
    if detect_layout(path).array:
        _check_same(found, json.loads(data.decode("utf-8-sig")))
    return found


def gzip(folder: Path, seed: int, count: int) -> tuple[Iterator[bytes], Case]:
    """.jsonl.gz."""
    path = folder / "rows.jsonl.gz"
    return files.gzip_cases(seed, count), _compressed(path, gzip_file.decompress)


def zst(folder: Path, seed: int, count: int) -> tuple[Iterator[bytes], Case]:
    """.jsonl.zst."""
    path = folder / "rows.jsonl.zst"
    return files.zst_cases(seed, count), _compressed(path, _unzstd)


def _unzstd(data: bytes) -> bytes:
    return zstd_file.decompress(data, options={zstd_file.DecompressionParameter.window_log_max: 31})


def _compressed(path: Path, decompress: Any) -> Case:
    """What is read must be complete frames of the two files' rows, and all that `decompress` finds."""
    sources = [[json.dumps(row) for row in each] for each in (files.ROWS, files.OTHER_ROWS)]

    def take(data: bytes) -> None:
        path.write_bytes(data)
        number = 0
        for chunk in read_chunks(Span(path, 0, None), 1 << 20):
            number += sum(1 for _ in records(chunk, Counter()))
        if number > MANY:
            return
        found = [json.dumps(row) for row in read_rows(path)]
        # An empty file is none to the library; step 1 refuses it before it is read.
        lines = [json.dumps(json.loads(line)) for line in (decompress(data) if data else b"").splitlines()]
        assert found == lines, (len(found), len(lines))
        at = 0
        while at < len(found):
            frame = next((each for each in sources if found[at : at + len(each)] == each), None)
            assert frame, found[at]
            at += len(frame)

    return take


def index(folder: Path, seed: int, count: int) -> tuple[Iterator[bytes], Case]:
    """An .idx and its .bin."""
    prefix, documents = folder / "data", [[5, 6, 7], [1], [399] * 50, [], [0, 65499]]
    with IndexedDatasetBuilder(prefix, "<u2") as writer:
        for document in documents:
            writer.add_document(np.array(document, np.int64))
    source, content = idx_path(prefix).read_bytes(), bin_path(prefix).read_bytes()
    all_ids = [each for document in documents for each in document]

    def take(data: bytes) -> None:
        (size,) = struct.unpack_from("<Q", data)
        idx_path(prefix).write_bytes(data[8 : 8 + size])
        bin_path(prefix).write_bytes(data[8 + size :])
        reader = open_tokens(prefix)
        assert sum(len(each) for each in reader) == reader.num_tokens == sum(reader.lengths.tolist())
        assert reader.longest == max(map(len, reader), default=0) and scan_id_range(reader)[0] >= 0
        reader.token_starts(np.arange(len(reader) + 1))
        found = [each.tolist() for each in reader]
        # Bounds that join or empty documents are the format's own, and so are lengths of tokens that were added.
        as_written = reader.index.num_document_indices == reader.index.num_sequences + 1 and data[8 + size :] == content
        assert found == documents or not as_written
        ids = all_ids if data[8 + size :] == content else np.frombuffer(data[8 + size :], reader.dtype).tolist()
        assert [each for document in found for each in document] == ids
        assert len(IndexedDataset(prefix, check=False)) == len(found)

    return files.index_cases(seed, count, source, content), take


def safetensors(folder: Path, seed: int, count: int) -> tuple[Iterator[bytes], Case]:
    """A model's weights, or the index of two files of them."""
    qwen, weights = write_hf(folder / "one", num_hidden_layers=1)
    source = (folder / "one" / SINGLE).read_bytes()
    names = sorted(weights)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    listed = {name: file for half, file in zip(halves, shards, strict=True) for name in half}
    (folder / "two").mkdir()
    for half, file in zip(halves, shards, strict=True):
        save_file({name: weights[name] for name in half}, folder / "two" / file, metadata={"format": "pt"})
    expected = hf_shapes(qwen)

    def take(data: bytes) -> None:
        single = not data.lstrip(b"\xef\xbb\xbf ").startswith(b"{")
        path = folder / "one" / SINGLE if single else folder / "two" / INDEX
        path.write_bytes(data)
        reader = HfReader(path.parent)
        check_weights(reader, expected, qwen)
        truth = load(data) if single else weights
        for name in reader.names:
            assert bitwise_equal(reader.tensor(name), truth[name]), name

    return files.safetensors_cases(seed, count, source, {"metadata": {"total_size": 1}, "weight_map": listed}), take


SURFACES: dict[str, Surface] = {
    each.__name__: each for each in (rows, jsonl, json_array, gzip, zst, index, safetensors)
}
