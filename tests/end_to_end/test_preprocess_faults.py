"""`python -m common.preprocess` when something goes wrong: it reports it, exits with 2, and loses nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.steps import ROOT, files, run, start, texts, wait_for, write_rows
from tests.soak.preprocess import soak
from tests.tiny import TEXTS, tiny_qwen


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen(tmp_path_factory.mktemp("qwen"))


def test_a_run_killed_at_any_moment_ends_as_an_uninterrupted_one(tmp_path: Path, qwen: Path) -> None:
    rows = [{"text": f"{i} " + TEXTS[i % 4] * (i % 9)} for i in range(12000)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    # The slow engine, so that there is time to kill it in.
    flags = {"input": path, "tokenizer_path": qwen, "workers": 2, "partitions": 6, "tokenizer_engine": "tokenizers"}
    run("pretrain", output_prefix=tmp_path / "whole" / "a", **flags)
    broken = tmp_path / "broken"
    reused = 0
    for parts in (0, 1, 3, 5):
        process = start("pretrain", output_prefix=broken / "a", **flags)
        wait_for(process, lambda parts=parts: len(list(broken.glob("*.parts/part_*_tokens.idx"))) >= parts)
        time.sleep(0.02)
        process.kill()
        reused += "from an earlier run" in process.communicate()[1]
        finals = list(broken.glob("a_*")) if broken.exists() else []
        assert not finals or {path.suffix for path in finals} >= {".bin"}
    assert reused >= 1
    run("pretrain", output_prefix=broken / "a", **flags)
    assert files(broken) == files(tmp_path / "whole")


def test_a_worker_that_is_killed_ends_the_run_and_loses_nothing(tmp_path: Path, qwen: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"{i} " + TEXTS[i % 4] * 9} for i in range(20000)])
    flags = {"input": path, "tokenizer_path": qwen, "workers": 2, "partitions": 4, "tokenizer_engine": "tokenizers"}
    process = start("pretrain", output_prefix=tmp_path / "out" / "a", **flags)
    wait_for(process, lambda: bool(list(tmp_path.glob("out/*.parts/part_00000_????????.json"))))
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "a worker process was killed" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.parts"]
    _, err = run("pretrain", output_prefix=tmp_path / "out" / "a", **flags)
    assert re.search(r"reusing parts? 1.* of \d+ from an earlier run", err)
    run("pretrain", output_prefix=tmp_path / "whole" / "a", **flags)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_bad_rows_stop_the_run_or_are_written_to_the_rejects_file(tmp_path: Path, qwen: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n{"text": "caf\xe9"}\n{"txt": 1}\n{"text": "good"}\n{"text": ""}\n')
    flags = {"input": path, "output_prefix": tmp_path / "out" / "a", "tokenizer_path": qwen, "workers": 1}
    _, err = run("pretrain", expect=2, **flags)
    assert "error: " in err and "a.jsonl, line 2: byte 0xe9 at column 14 is not UTF-8" in err
    assert not list(tmp_path.glob("out/a_*"))
    _, err = run("pretrain", on_error="skip", **flags)
    assert (
        "dropped 2 documents: bad rows, written to the rejects file" in err and f"rejects: {tmp_path}/out/a.rej" in err
    )
    rows = map(json.loads, (tmp_path / "out" / "a.rejects").read_text(encoding="utf-8").splitlines())
    found = [(row["file"], row["line"], row["cause"][:22]) for row in rows]
    assert found == [(str(path), 2, "byte 0xe9 at column 14"), (str(path), 3, "it has no field 'text'")]
    counts = json.loads((tmp_path / "out" / "a.json").read_text())["documents"]
    assert counts == {"read": 5, "kept": 2, "dropped": {"bad rows, written to the rejects file": 2, "no text": 1}}


def test_a_file_that_cannot_be_read_is_reported(tmp_path: Path, qwen: Path) -> None:
    # Reading its first page fails for root too.
    flags = {"input": "/proc/self/mem", "output_prefix": tmp_path / "a", "tokenizer_path": qwen}
    _, err = run("pretrain", expect=2, **flags)
    assert "error: /proc/self/mem cannot be read: Input/output error" in err and "Traceback" not in err


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_reported_and_the_run_resumes_once_there_is_room(tmp_path: Path, qwen: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"{i} {TEXTS[i % 4]}"} for i in range(20000)])
    small = tmp_path / "small"
    small.mkdir()
    flags = {"input": path, "tokenizer_path": qwen, "workers": 2, "partitions": 4}
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", small], check=True)
    try:
        _, err = run("pretrain", expect=2, output_prefix=small / "a", **flags)
        assert "cannot be written: No space left on device" in err and "finished parts are kept" in err
        names = [each.name for each in small.rglob("*")]
        assert any(re.fullmatch(r"part_00000_\w{8}\.json", name) for name in names) and not any(
            name.startswith("a_") for name in names
        )
        subprocess.run(["mount", "-o", "remount,size=8m", small], check=True)
        _, err = run("pretrain", output_prefix=small / "a", **flags)
        assert re.search(r"reusing parts? 1.* of \d+ from an earlier run", err)
        run("pretrain", output_prefix=tmp_path / "whole" / "a", **flags)
        assert files(small) == files(tmp_path / "whole")
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("kind", ["lines", "array"])
def test_memory_does_not_grow_with_the_input(tmp_path: Path, qwen: Path, kind: str) -> None:
    peaks = []
    for megabytes in (4, 60):
        path = tmp_path / f"{megabytes}.json"
        rows = [json.dumps({"text": f"{i} " + TEXTS[i % 4] * 20}) for i in range(megabytes * 700)]
        path.write_text("[" + ",\n".join(rows) + "]" if kind == "array" else "\n".join(rows))
        words = ["--input", path, "--output-prefix", tmp_path / f"out{megabytes}", "--tokenizer-path", qwen]
        # Started by a small process: a child's peak begins with its parent's.
        program = (
            "import os, subprocess, sys; p = subprocess.Popen(sys.argv[1:]); _, status, used = os.wait4(p.pid, 0)\n"
            "print(used.ru_maxrss // 1024); sys.exit(status >> 8)"
        )
        command = [sys.executable, "-m", "common.preprocess", "pretrain", *map(str, words), "--workers", "1"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        out = subprocess.check_output([sys.executable, "-c", program, *command], text=True, env=environment)
        peaks.append(int(out))
    assert path.stat().st_size > 55e6 and peaks[1] < peaks[0] + 25, peaks


def test_a_full_disk_is_reported_and_nothing_has_a_final_name(tmp_path: Path, qwen: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts(4000)])
    limited = 'ulimit -f 100; exec "$0" -m common.preprocess pretrain "$@"'  # KiB a file, as if no more were free
    words = ["--input", path, "--output-prefix", tmp_path / "out" / "a", "--tokenizer-path", qwen, "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", limited, sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "cannot be written: File too large" in done.stderr
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["a.parts", "lock"]


def test_an_output_that_would_overwrite_an_input_is_refused(tmp_path: Path, qwen: Path) -> None:
    path = write_rows(tmp_path / "a.json", [{"text": "12"}])
    before = path.read_bytes()
    _, err = run("pretrain", expect=2, input=path, output_prefix=tmp_path / "a", tokenizer_path=qwen)
    assert "OUTPUT_PREFIX=" in err and f"would overwrite the input {path}" in err and path.read_bytes() == before


def test_twelve_kills_of_its_script_at_random_moments_change_nothing(tmp_path: Path) -> None:
    assert soak(tmp_path / "soak", number=12, seed=7, num_rows=8000).startswith("12 kills in ")
