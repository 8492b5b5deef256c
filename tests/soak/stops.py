"""Stops by each signal: python -m tests.soak.stops --folder /tmp/soak --layout dp2 --number 20

SIGTERM, SIGINT, SIGHUP and SIGUSR1 in turn, at random moments, to the launcher or a rank. Each must end with exit code
75 and a checkpoint of the step at which it stopped, from which the same command resumes.
"""

import os
import random
import signal
import time

from tests.distributed.user import wait_for
from tests.soak.small import LOSS, Soak, arguments

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def main() -> None:
    """Stops, compares, and prints the result."""
    given = arguments(__doc__ or "", 20)
    rng, total, seconds = random.Random(given.seed), len(SIGNALS) * given.number, []
    soak = Soak(given.folder / "stops", given.layout, TRAIN_ITERS=20 * total, EVAL_INTERVAL=9, SAVE_INTERVAL=7)
    reached = 0
    for stop in range(total):
        run = soak.start("stopped")
        wait_for(lambda: LOSS.search(run.text()) is not None, 300)  # noqa: B023
        time.sleep(rng.uniform(0, 1.5))
        number, target = SIGNALS[stop % len(SIGNALS)], rng.choice(["launcher", "rank"])
        os.kill(run.process.pid if target == "launcher" else rng.choice(run.ranks()).pid, number)
        stopped_at = time.monotonic()
        log = run.end(75, 120)
        seconds.append(time.monotonic() - stopped_at)
        steps = [int(i) for i, _, _ in LOSS.findall(log)]
        assert run.tracker() == steps[-1] and steps == list(range(reached + 1, steps[-1] + 1)), (reached, steps)
        reached = steps[-1]
        print(f"stop {stop + 1}: {number.name} to the {target}, iteration {reached}, {seconds[-1]:.1f} s", flush=True)
    print(f"{total} stops, {reached} iterations, none lost, none twice; {max(seconds):.1f} s at most to the end")


if __name__ == "__main__":
    main()
