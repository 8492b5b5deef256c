"""What opening data costs by its number of documents: `python -m tests.bench.bench_opening FOLDER 1 4 20`, in millions.

Each row is a process of its own, on files in the page cache where memory holds them; FOLDER needs 28 bytes a document.
"""

import argparse
import multiprocessing
import time
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np

from common.data.dataset.gpt_dataset import GPTDataset
from common.data.dataset.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

MILLION = 1_000_000
TOKENS, SEQ_LENGTH, SAMPLES = 4, 512, 1000


def write(prefix: Path, millions: int) -> None:
    """Documents of TOKENS tokens."""
    with IndexedDatasetBuilder(prefix, "<u2") as writer:
        for _ in range(millions):
            writer.add_documents(np.ones(TOKENS * MILLION, np.uint16), np.full(MILLION, TOKENS, np.int32))


def own_mib() -> int:
    """Memory of this process that is not backed by a file."""
    words = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(words["RssAnon"].split()[0]) >> 10


def measure(prefix: Path, check: bool, result: "Queue[list[Any]]") -> None:
    """[seconds to open, to the first sample, to that of the next epoch, microseconds a sample, MiB of its own]."""
    before, times = own_mib(), [time.perf_counter()]
    reader = IndexedDataset(prefix, check)
    times.append(time.perf_counter())
    samples = GPTDataset(reader, range(len(reader)), SEQ_LENGTH, 0, False)
    for index in (0, samples.samples_per_epoch):
        samples[index]
        times.append(time.perf_counter())
    for index in range(1, SAMPLES + 1):
        samples[samples.samples_per_epoch + index]
    times.append(time.perf_counter())
    opened, first, epoch, many = np.diff(times).tolist()
    result.put([opened, first, epoch, many / SAMPLES * 1e6, own_mib() - before])


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("millions", type=int, nargs="+")
    arguments = parser.parse_args()
    print("| documents | opened | s | first sample, s | next epoch's, s | µs per sample | private MiB |")
    print("|---|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for millions in arguments.millions:
        prefix = arguments.folder / f"opening_{millions}"
        write(prefix, millions)
        for check in (True, False):
            result = context.Queue()
            process = context.Process(target=measure, args=(prefix, check, result))
            process.start()
            opened, first, epoch, sample, memory = result.get()
            process.join()
            way = "checked" if check else "by a rank"
            figures = f"{opened:.3f} | {first:.3f} | {epoch:.3f} | {sample:.0f} | {memory}"
            print(f"| {millions * MILLION:,} | {way} | {figures} |")
        for end in (".bin", ".idx"):
            Path(f"{prefix}{end}").unlink()


if __name__ == "__main__":
    main()
