"""SIGKILL at random moments: python -m tests.soak.kills --folder /tmp/soak --layout tp2_pp2 --number 25

A third of them at any time, a third while a checkpoint is written, renamed and named, a third around an evaluation; to
the launcher or to a rank. The same command resumes each time, and nothing may be lost: every loss and the final weights
are those of the uninterrupted run, to the bit.
"""

import collections
import os
import random
import signal
import time

from tests.distributed.user import Run, wait_for
from tests.soak.small import Soak, arguments


def moment(run: Run, kind: str, rng: random.Random) -> None:
    """Returns when the run is to be killed, or has ended."""
    wait_for(lambda: "iteration " in run.text() or run.process.poll() is not None, 300)
    if kind == "any":
        time.sleep(rng.uniform(0, 4))
    elif kind == "save":
        time.sleep(rng.uniform(0, 1))
        wait_for(lambda: any(run.folder.glob("*.partial")) or run.process.poll() is not None, 120)
        time.sleep(rng.uniform(0, 0.8))
    else:
        seen = run.text().count("validation at iteration")
        wait_for(lambda: run.text().count("validation at iteration") > seen or run.process.poll() is not None, 120)
        time.sleep(rng.uniform(0, 1.2))  # what is saved is saved after it


def main() -> None:
    """Kills, compares, and prints the result."""
    given = arguments(__doc__ or "", 25)
    rng, counts = random.Random(given.seed), collections.Counter[str]()
    name = f"killed_{given.async_save}"
    soak = Soak(given.folder / given.layout, given.layout, ASYNC_SAVE=given.async_save, TRAIN_ITERS=10 * given.number)
    soak.uninterrupted(SAVE_CHECKPOINT_PATH=soak.folder / f"uninterrupted_{given.async_save}")
    kills = 0
    while True:
        run = soak.start(name)
        if kills < given.number:
            kind = ("any", "save", "evaluation")[kills % 3]
            moment(run, kind, rng)
        if kills == given.number or run.process.poll() is not None:
            soak.compare(run.end(0, 3600))
            break
        target = rng.choice(["launcher", "rank"])
        os.kill(run.process.pid if target == "launcher" else rng.choice(run.ranks()).pid, signal.SIGKILL)
        run.process.wait(60)
        wait_for(lambda: not run.processes(), 30)  # noqa: B023
        soak.compare(run.text())
        kills += 1
        counts[f"{kind}, {target}"] += 1
        tracker = run.folder / "latest_checkpointed_iteration.txt"
        if tracker.exists():
            assert (run.folder / f"iter_{int(tracker.read_text()):07d}" / "metadata.json").is_file()
        print(f"kill {kills}: {kind}, {target}; {soak.compared} losses compared", flush=True)
    tensors = soak.compare_weights(f"uninterrupted_{given.async_save}", name)
    print(
        f"{kills} kills {dict(counts)}: {soak.compared} losses and {tensors} tensors are those of the uninterrupted run"
    )


if __name__ == "__main__":
    main()
