"""The answers to a file of prompts, a row of jsonl for each, in their order."""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common import errors
from common.errors import writing
from common.files import PARTIAL
from common.inference.generation import Generator
from common.inference.prompt_rows import Prompt
from common.log import logger

LOG_INTERVAL_S = 60.0


def answer_all(generator: Generator, prompts: Sequence[Prompt], batch_size: int, output: Path | None) -> None:
    """Writes a row for each of `prompts` to `output`, a new file that has its name once it is whole, or to stdout.

    Each row has the prompt's fields, `output`, `finish_reason` and the numbers of tokens.
    """
    began = logged_at = time.monotonic()
    reasons: Counter[str] = Counter()
    tokens = 0
    with _writer(output) as write:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            for prompt, answer in zip(batch, generator.batch([each.ids for each in batch]), strict=True):
                counts = {"prompt_tokens": len(prompt.ids), "output_tokens": len(answer.ids)}
                reason = {"output": answer.text, "finish_reason": answer.finish_reason}
                write(json.dumps({**prompt.fields, **reason, **counts}, ensure_ascii=False))
                reasons[answer.finish_reason] += 1
                tokens += len(answer.ids)
            if time.monotonic() - logged_at >= LOG_INTERVAL_S:
                logged_at = time.monotonic()
                logger.info("%d of %d prompts answered", start + len(batch), len(prompts))
    seconds = time.monotonic() - began
    ends = ", ".join(f"{count} by {reason}" for reason, count in sorted(reasons.items()))
    logger.info("%d answers (%s) of %d tokens in %.1f s", len(prompts), ends, tokens, seconds)


@contextmanager
def _writer(output: Path | None) -> Iterator[Callable[[str], None]]:
    """Writes a line: to stdout, or to a file beside `output` that is renamed at the end of the block."""
    if output is None:
        yield lambda line: print(errors.visible(line) if sys.stdout.isatty() else line, flush=True)
        return
    partial = output.with_name(output.name + PARTIAL)
    with writing(partial):
        output.parent.mkdir(parents=True, exist_ok=True)
        stream = partial.open("w", encoding="utf-8")

    def write(line: str) -> None:
        with writing(partial):
            stream.write(line + "\n")
            stream.flush()

    with stream:
        try:
            yield write
        except BaseException:
            logger.info("unfinished: the answers so far are in %s", partial)
            raise
        with writing(partial):
            os.fsync(stream.fileno())
    partial.replace(output)
    logger.info("written: %s", output)
