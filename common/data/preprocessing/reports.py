"""What a run of step 1 logs."""

from collections import Counter
from pathlib import Path
from typing import Any

from common.data.preprocessing import merging
from common.data.preprocessing.job import Job
from common.data.preprocessing.parts import FinishedPart
from common.data.preprocessing.rejects import rejects_path
from common.log import listed, logger


def report_reused(numbers: list[int], of: int) -> None:
    """Logs which parts of an earlier run are reused, numbered from 1."""
    shown = listed([number + 1 for number in numbers])
    logger.info("reusing part%s %s of %d from an earlier run", "" if len(numbers) == 1 else "s", shown, of)


def report_partition(job: Job, parts: list[FinishedPart], encoded: int, seconds: float) -> None:
    """Logs what one partition read, dropped and wrote, and the speed."""
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    _report_counts(merging.dropped_of(counts), merging.notes_of(counts))
    assert job.partition_index is not None
    logger.info(
        "wrote partition %d of %d: %d rows; %s; when all are written, run `python -m common.preprocess merge`",
        job.partition_index + 1, job.partitions, counts["read"], _speed(encoded, seconds),
    )  # fmt: skip


def _report_counts(dropped: dict[str, int], notes: dict[str, int]) -> None:
    for cause, number in dropped.items():
        if number:
            logger.info("dropped %d documents: %s", number, cause)
    for note, number in notes.items():
        logger.info("%s: %d", note, number)


def _speed(encoded: int, seconds: float) -> str:
    return f"{encoded / 1e6:.1f} MB in {seconds:.1f} s = {encoded / 1e6 / max(seconds, 1e-9):.2f} MB/s"


def report(output_prefix: Path, content: dict[str, Any], encoded: int, seconds: float) -> None:
    """Logs what was read, dropped and written, and the speed."""
    documents = content["documents"]
    _report_counts(documents["dropped"], content["notes"])
    what = "pairs" if content["kind"] == "preference" else "documents"
    supervised = f", {content['supervised_tokens']} of them supervised" if "loss_mask" in content["files"] else ""
    logger.info(
        "%d %s, %d tokens%s, longest document %d; %s",
        documents["kept"], what, content["tokens"], supervised, content["longest"],
        _speed(encoded, seconds),
    )  # fmt: skip
    rejects = rejects_path(output_prefix)
    if rejects.exists():
        logger.info("rejects: %s", rejects)
    files = (output_prefix.with_name(name) for name in content["files"].values())
    logger.info("wrote %s", ", ".join(f"{file}.bin/.idx" for file in files))
    logger.info("DATASET_PATH=%s", output_prefix)
