"""Measures step 1 for pretraining against gigatoken alone and against Megatron-LM's tools, all in one run.

    python tests/bench/bench_preprocess.py --tokenizer FOLDER [--input FILE.jsonl | --megabytes 700]
        [--megatron CHECKOUT] [--cores N] [--repeats 3]

Every program is a fresh process on the same cores. MB are 10^6 bytes of text in UTF-8, for all of them. "start-up" is
what passes before the first document is encoded: imports, the tokenizer, and for ours the comparison of the engines.
Peak memory is the sum of PSS over a program's processes, sampled four times a second.
Without --input a corpus is made of the text files of this machine, each line of which is in it once.
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson

KIT = Path(__file__).parents[2]
ENDINGS = (".py", ".html", ".txt", ".h", ".js", ".md", ".rst", ".pyi", ".c", ".rs", ".java", ".tex")
MAX_CHARACTERS = 100_000


@dataclass
class Result:
    """One program's time over the text: seconds of work, of the whole process, bytes of peak memory, its tokens."""

    work_s: float
    whole_s: float
    peak_bytes: int
    tokens: int = 0


def texts_of_machine() -> Iterator[str]:
    """The text of the files of this machine, shuffled; no line of more than 40 characters comes twice."""
    roots = ["/usr", "/opt", str(Path.home()), sys.prefix]
    paths = sorted({p for root in roots for p in Path(root).rglob("*") if p.suffix in ENDINGS and p.is_file()})
    random.Random(0).shuffle(paths)
    seen: set[int] = set()
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if path.suffix == ".html":
            text = re.sub(r"\n\s*\n+", "\n\n", re.sub(r"<[^>]+>", "", text))
        lines = []
        for line in text[:MAX_CHARACTERS].split("\n"):
            if len(line) > 40:
                if hash(line) in seen:
                    continue
                seen.add(hash(line))
            lines.append(line)
        if sum(map(len, lines)) >= 200:
            yield "\n".join(lines).replace("<|", "< |")  # no special token is spelled


def write_corpus(path: Path, megabytes: float) -> None:
    left = megabytes * 1e6
    with path.open("wb") as stream:
        for text in texts_of_machine():
            left -= stream.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            if left <= 0:
                return
    print(f"note: this machine has only {path.stat().st_size / 1e6:.0f} MB of such text")


def peak_of(process: subprocess.Popen[str], peak: list[int]) -> None:
    """Keeps peak[0] at the largest sum of the PSS of `process` and all below it."""
    while process.poll() is None:
        total = 0
        for pid in [process.pid, *below(process.pid)]:
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:
                continue
            total += sum(1024 * int(number) for number in re.findall(r"^Pss: +(\d+)", rollup, re.M))
        peak[0] = max(peak[0], total)
        time.sleep(0.25)


def below(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [each for child in map(int, children) for each in (child, *below(child))]


def measured(command: list[str], cores: list[int], **variables: str) -> tuple[str, float, int]:
    """(what it printed, seconds of the whole process, peak bytes) of `command`; ends the benchmark when it fails."""
    environment = {**os.environ, "PYTHONPATH": str(KIT), **variables}
    started = time.monotonic()
    process = subprocess.Popen(
        ["taskset", "-c", ",".join(map(str, cores)), *command],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    peak = [0]
    watch = threading.Thread(target=peak_of, args=(process, peak))
    watch.start()
    out, _ = process.communicate()
    seconds = time.monotonic() - started
    watch.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{out[-3000:]}")
    return out, seconds, peak[0]


def gigatoken_alone(path: str, folder: str, batch_bytes: int) -> None:
    """Prints the seconds gigatoken takes for the texts of `path` in memory, the first time; a process of its own."""
    from gigatoken import Tokenizer

    content = json.loads(Path(folder, "tokenizer.json").read_bytes())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
    tokenizer = Tokenizer.from_json(json.dumps(content))
    with Path(path).open("rb") as stream:
        texts = [orjson.loads(line)["text"] for line in stream]
    bounds, size = [0], 0
    for number, text in enumerate(texts, 1):
        size += len(text)
        if (batch_bytes and size >= batch_bytes) or number == len(texts):
            bounds.append(number)
            size = 0
    batches = [texts[start:end] for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    started, tokens = time.monotonic(), 0
    for batch in batches:
        tokens += len(tokenizer.encode_batch(batch, parallel=True).layout.content.data)
    print(json.dumps([time.monotonic() - started, tokens]))


def bench_gigatoken(path: Path, folder: Path, cores: list[int], batch_bytes: int) -> Result:
    words = f"{str(path)!r}, {str(folder)!r}, {batch_bytes}"
    code = f"from tests.bench.bench_preprocess import gigatoken_alone as g; g({words})"
    # Its pool has as many threads as the process may use cores.
    out, total, peak = measured([sys.executable, "-c", code], cores, RAYON_NUM_THREADS=str(len(cores)))
    seconds, tokens = json.loads(out.splitlines()[-1])
    return Result(seconds, total, peak, tokens)


def bench_kit(path: Path, folder: Path, cores: list[int], out: Path, *flags: str) -> Result:
    command = [
        *(sys.executable, "-m", "common.preprocess", "pretrain", "--input", str(path), "--output-prefix", str(out)),
        *("--tokenizer-path", str(folder), "--workers", str(len(cores)), *flags),
    ]
    printed, total, peak = measured(command, cores)
    seconds = float(re.findall(r" MB in ([\d.]+) s", printed)[0])
    return Result(seconds, total, peak, json.loads(Path(f"{out}.json").read_text())["tokens"])


def bench_megatron(path: Path, folder: Path, cores: list[int], out: Path, checkout: Path, tool: str) -> Result:
    command = [
        *(sys.executable, str(checkout / "tools" / tool), "--input", str(path), "--output-prefix", str(out)),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder), "--append-eod"),
        *(("--use-gigatoken",) if "fast" in tool else ("--workers", str(len(cores)))),
    ]
    # What else its imports need may be given by PYTHONPATH.
    folders = f"{checkout}:{os.environ.get('PYTHONPATH', '')}"
    _, total, peak = measured(command, cores, PYTHONPATH=folders, CUDA_VISIBLE_DEVICES="")
    tokens = Path(f"{out}_text_document.bin").stat().st_size // 4
    return Result(total, total, peak, tokens)


def line(name: str, results: list[Result], text_bytes: int, documents: int) -> str:
    best = min(results, key=lambda result: result.work_s)
    spread = f"{min(r.work_s for r in results):.2f} to {max(r.work_s for r in results):.2f}"
    return (
        f"| {name} | {spread} | {text_bytes / 1e6 / best.work_s:.1f} | {best.tokens / best.work_s / 1e6:.2f} |"
        f" {documents / best.work_s:,.0f} | {best.whole_s - best.work_s:.1f} | {best.whole_s:.1f} |"
        f" {max(r.peak_bytes for r in results) / 2**20:.0f} |"
    )


def same(ours: Path, theirs: Path) -> str:
    ends = (".bin", ".idx")
    equal = all(Path(f"{ours}{e}").read_bytes() == Path(f"{theirs}{e}").read_bytes() for e in ends)
    return "byte for byte the same" if equal else "DIFFERENT"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--input", type=Path)
    parser.add_argument("--megabytes", type=float, default=700)
    parser.add_argument("--megatron", type=Path)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-tokenizers", action="store_true")
    settings = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: settings.cores]
    with tempfile.TemporaryDirectory(dir=settings.input.parent if settings.input else None) as name:
        compare(settings, cores, Path(name))


def compare(settings: argparse.Namespace, cores: list[int], folder: Path) -> None:
    path = settings.input or folder / "corpus.jsonl"
    if not settings.input:
        write_corpus(path, settings.megabytes)
    documents = text_bytes = 0
    with path.open("rb") as stream:  # also brings the file into the page cache, for all alike
        for row in stream:
            documents += 1
            text_bytes += len(orjson.loads(row)["text"].encode())
    print(f"{platform.processor() or platform.machine()}, {len(cores)} cores, load {os.getloadavg()[0]:.1f} at start")
    print(f"{documents:,} documents, {text_bytes / 1e6:.1f} MB of text, {path.stat().st_size / 1e6:.1f} MB of jsonl\n")
    print("| program | seconds | MB/s | million tokens/s | documents/s | start-up s | total s | peak MiB |")
    print("|---|---|---|---|---|---|---|---|")
    alone, batched, ours = [], [], []
    for number in range(settings.repeats):  # alternating, so that a disturbance affects all
        alone.append(bench_gigatoken(path, settings.tokenizer, cores, 0))
        batched.append(bench_gigatoken(path, settings.tokenizer, cores, 1 << 20))
        ours.append(bench_kit(path, settings.tokenizer, cores, folder / f"ours{number}"))
    print(line("gigatoken alone, in memory, in one call", alone, text_bytes, documents), flush=True)
    print(line("gigatoken alone, in memory, in calls of 1 MiB", batched, text_bytes, documents), flush=True)
    print(line("step 1, gigatoken", ours, text_bytes, documents), flush=True)
    best = min(result.work_s for result in ours)
    summary = [
        f"step 1 reaches {min(r.work_s for r in alone) / best:.0%} of gigatoken alone in one call,"
        f" {min(r.work_s for r in batched) / best:.0%} in calls of 1 MiB"
    ]
    if not settings.skip_tokenizers:
        slow = bench_kit(path, settings.tokenizer, cores, folder / "slow", "--tokenizer-engine", "tokenizers")
        print(line("step 1, tokenizers", [slow], text_bytes, documents), flush=True)
        summary.append(f"both engines: {same(folder / 'ours0_text_document', folder / 'slow_text_document')}")
    for tool in ("preprocess_data.py", "preprocess_data_fast.py"):
        if not settings.megatron or not (settings.megatron / "tools" / tool).is_file():
            continue
        out = folder / tool.removesuffix(".py")
        theirs = bench_megatron(path, settings.tokenizer, cores, out, settings.megatron, tool)
        print(line(f"Megatron-LM, {tool}", [theirs], text_bytes, documents), flush=True)
        times = theirs.whole_s / min(r.whole_s for r in ours)
        summary.append(f"{tool}: step 1 is {times:.1f} times as fast as a whole process; the files are "
                    f"{same(folder / 'ours0_text_document', Path(f'{out}_text_document'))}")  # fmt: skip
    print("\n" + "\n".join(summary))


if __name__ == "__main__":
    if not shutil.which("taskset"):
        sys.exit("taskset is missing: install util-linux")
    main()
