"""Readers of the JSON files that step 1 leaves: manifests, and the states of parts and runs that are not merged yet."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.data.dataset.blended_dataset import read_blend
from common.data.dataset.builder import check_against_manifest
from common.data.dataset.id_range import check_ids
from common.data.dataset.indexed_dataset import open_tokens
from common.data.dataset.manifest import manifest_path, resolve
from common.data.dataset.show import show
from common.data.dataset.stats import report
from common.data.encoders.encoded import EncodedChunk
from common.data.preprocessing import runner
from common.data.preprocessing.job import Job
from common.data.preprocessing.parts import EarlierParts
from common.data.sources.chunks import Chunk
from common.data.tokenizer.text_tokenizer import TextTokenizer, load_tokenizer
from common.demo.tokenizer import write_tokenizer
from tests.fuzz.bounds import Case, Surface
from tests.fuzz.configs import cases
from tests.fuzz.rows import change

FIELDS = ("kind", "files", "tokens", "loss_mask", "documents", "inputs", "path", "size", "blocks", "head", "tail",
          "largest_id", "tokenizer", "version", "format", "parts", "plan", "facts", "index")  # fmt: skip


def _cases(seed: int, count: int, source: dict[str, Any]) -> Iterator[bytes]:
    """Of the JSON `source`: values anywhere in it are changed as in rows, or as in other JSON files."""
    rng, plain = random.Random(seed), cases(seed, count, source, FIELDS)
    for text in plain:
        if rng.random() < 0.5:
            made = copy.deepcopy(source)
            for _ in range(rng.choice((1, 1, 2, 3))):
                change(rng, made)
            text = json.dumps(made).encode()
        yield text


def encode(chunk: Chunk) -> EncodedChunk:
    """A line is the document of its bytes, all of which are learned."""
    lines = chunk.data.split(b"\n")[:-1]
    tokens = np.frombuffer(b"".join(lines), np.uint8).astype(np.uint16)
    streams = {"tokens": tokens, "loss_mask": np.ones(tokens.size, np.uint8)}
    made = EncodedChunk(streams, np.array([len(line) for line in lines], np.int32))
    made.counts["read"] = len(lines)
    return made


def _job(folder: Path, partitions: int = 1, index: int | None = None) -> Job:
    path = folder / "rows.jsonl"
    if not path.exists():
        path.write_text("".join(f"row {i:06d}\n" for i in range(40)))
    streams = {
        "loss_mask": ("loss_mask_document", np.dtype(np.uint8)),
        "tokens": ("text_document", np.dtype("<u2")),
    }
    return Job("sft", folder / "data", [path], streams, encode, {"settings": {"loss_on": "answer"}}, 1,
               partitions, index)  # fmt: skip


def manifest(folder: Path, seed: int, count: int) -> tuple[Iterator[bytes], Case]:
    """The manifest of fine-tuning data, as training, show, stats and step 1 itself read it."""
    job = _job(folder)
    runner.run(job)
    path = manifest_path(job.output_prefix)
    source = json.loads(path.read_text())
    write_tokenizer(folder / "tokenizer", ["the cat sat on the mat"] * 4, 300)
    tokenizer = load_tokenizer(folder / "tokenizer")
    documents = [each.tolist() for each in open_tokens(resolve(str(job.output_prefix)).tokens)]

    def take(data: bytes) -> None:
        path.write_bytes(data)
        _read(job, tokenizer, documents)

    return _cases(seed, count, source), take


def _read(job: Job, tokenizer: TextTokenizer, documents: list[list[int]]) -> None:
    ((_, files),) = read_blend(str(job.output_prefix))
    tokens = open_tokens(files.tokens)
    check_against_manifest(files, tokens)
    check_ids(files, tokens, tokenizer.vocab_size, Path("config.json"))
    for _ in (*report(files, [4, 16], 8), *show(files, tokenizer, 0, 1, False)):
        pass
    runner.check(job)
    assert files.loss_mask is None or [each.tolist() for each in tokens] == documents


def part(folder: Path, seed: int, count: int) -> tuple[Iterator[bytes], Case]:
    """The state of a part and the claim of a run, as the next run and merge read them."""
    for index in (0, 1):
        runner.run(_job(folder, 2, index))
    parts = _job(folder, 2).folder
    sources = [json.loads(next(iter(sorted(parts.glob(name)))).read_text()) for name in ("part_*.json", "run_*.json")]
    paths = [next(iter(sorted(parts.glob(name)))) for name in ("part_*.json", "run_*.json")]
    contents = [path.read_bytes() for path in paths]
    given = [_cases(seed + i, count, source) for i, source in enumerate(sources)]

    def take(data: bytes) -> None:
        which = data[0]
        paths[which].write_bytes(data[1:])
        paths[1 - which].write_bytes(contents[1 - which])
        EarlierParts(parts)
        runner.merge(folder / "data", check=True)

    return (bytes([i % 2]) + next(given[i % 2]) for i in range(count)), take


SURFACES: dict[str, Surface] = {"manifest": manifest, "part": part}
