"""Files are mapped by some threads while others load tensors of theirs, as when a run resumes."""

import sys
import threading
import time
from pathlib import Path

import torch

from common.checkpoint.io.mapped_file import MappedFile, load

THREADS, SECONDS = 4, 2.0


def test_threads_map_and_load_files_at_once(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.bin" for i in range(40)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 8192)
    errors: list[BaseException] = []
    loaded = [0] * THREADS
    end = time.monotonic() + SECONDS

    def work(number: int) -> None:
        files: list[MappedFile] = []
        try:
            while time.monotonic() < end:
                i = loaded[number] % len(paths)
                files = [*files[-20:], MappedFile(paths[i])]
                assert torch.equal(load(files[-1].bytes), torch.full((8192,), i, dtype=torch.uint8))
                loaded[number] += 1
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors and min(loaded) > 100, (errors, loaded)
