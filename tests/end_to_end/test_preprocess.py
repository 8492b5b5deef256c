"""`python -m common.preprocess` as users run it, judged by Megatron-Core's reader and by the tokenizer."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from tests.tiny import TEXTS, tiny_qwen

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen(tmp_path_factory.mktemp("qwen"))


def start(command: str, **flags: Any) -> subprocess.Popen[str]:
    words = [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]
    check = ["--check"] if flags.get("check") else []
    words = [word for word in words if word not in ("--check", "True")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "common.preprocess", command, *words, *check],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(command: str, expect: int = 0, **flags: Any) -> tuple[str, str]:
    """(stdout, stderr) of the command, which must exit with `expect`."""
    process = start(command, **flags)
    out, err = process.communicate(timeout=120)
    assert process.returncode == expect, err
    return out, err


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(count: int) -> list[str]:
    return [f"{i} {TEXTS[i % 4]} <|im_end|>" * (i % 4) for i in range(count)]


def chats(count: int) -> list[dict[str, str]]:
    return [
        {"instruction": "Be brief." * (i % 2), "input": f"What is {i}+1?", "output": f"It is {i + 1}。"}
        for i in range(count)
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_pretraining_data_is_what_the_tokenizer_gives(tmp_path: Path, qwen: Path) -> None:
    documents = texts(60)
    write_rows(tmp_path / "b.jsonl", [{"body": text, "id": 1} for text in documents[:40]])
    write_rows(tmp_path / "c.jsonl", [{"body": text} for text in documents[40:]])
    _, err = run(
        "pretrain", input=tmp_path, output_prefix=tmp_path / "new" / "a", tokenizer_path=qwen, json_key="body",
        workers=2, partitions=3,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    expected = [tokenizer(text, split_special_tokens=True).input_ids + [end] for text in documents if text]
    theirs = IndexedDataset(str(tmp_path / "new" / "a_body_document"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == expected
    content = json.loads((tmp_path / "new" / "a.json").read_text())
    assert content["documents"] == {"read": 60, "kept": 45, "dropped": {"no text": 15}}
    assert content["tokens"] == sum(map(len, expected)) and content["longest"] == max(map(len, expected))
    assert (content["kind"], content["tokenizer"]["eod_id"], content["tokenizer"]["vocab_size"]) == (
        "pretrain",
        end,
        400,
    )
    assert [each["path"] for each in content["inputs"]] == [str(tmp_path / "b.jsonl"), str(tmp_path / "c.jsonl")]
    assert f"kept as ordinary text: {sum(i % 4 for i in range(60))}\n" in err
    assert "dropped, no text: 15 documents" in err and "MB/s" in err and "\r" not in err


def test_without_end_of_document(tmp_path: Path, qwen: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "12"}])
    run("pretrain", input=path, output_prefix=tmp_path / "a", tokenizer_path=qwen, append_eod="false")
    ids = AutoTokenizer.from_pretrained(qwen)("12").input_ids
    theirs = IndexedDataset(str(tmp_path / "a_text_document"))  # its documents die with it
    assert theirs[0].tolist() == ids


def test_fine_tuning_data_supervises_answers_alone(tmp_path: Path, qwen: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", chats(30))
    flags = {"input": path, "output_prefix": tmp_path / "a", "tokenizer_path": qwen, "workers": 2, "seq_length": 30}
    out, err = run("sft", **flags, check=True)
    assert out.startswith("ok: ") and sorted(tmp_path.iterdir()) == [path]
    _, err = run("sft", **flags)
    assert "rows are of format instruction" in err
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    tokens = IndexedDataset(str(tmp_path / "a_text_document"))
    mask = IndexedDataset(str(tmp_path / "a_loss_mask_document"))
    for i, row in enumerate(chats(30)):
        turns = [("system", row["instruction"]), ("user", row["input"]), ("assistant", row["output"])]
        talk = [{"role": role, "content": content} for role, content in turns if content]
        assert tokenizer.decode(tokens[i]) == tokenizer.apply_chat_template(talk, tokenize=False)
        assert tokenizer.decode(tokens[i][mask[i] == 1]) == row["output"] + "<|im_end|>"
        assert set(mask[i].tolist()) == {0, 1}
    too_long = sum(len(tokens[i]) > 31 for i in range(30))
    assert f" {too_long} of 30 samples have more than SEQ_LENGTH + 1 = 31 tokens" in err
    longest = max(len(tokens[i]) for i in range(30))
    _, err = run("sft", **{**flags, "seq_length": longest - 1})
    assert f" 0 of 30 samples have more than SEQ_LENGTH + 1 = {longest} tokens" in err
    out, _ = run("show", data=tmp_path / "a", tokenizer_path=qwen, index=1, count=1)
    assert "Be brief.<|im_end|>" in out and "⟦It is 2。<|im_end|>⟧" in out


def test_a_run_killed_at_any_moment_ends_as_an_unbroken_one(tmp_path: Path, qwen: Path) -> None:
    rows = [{"text": f"{i} " + TEXTS[i % 4] * (i % 9)} for i in range(12000)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    flags = {"input": path, "tokenizer_path": qwen, "workers": 2, "partitions": 6}
    started = time.monotonic()
    run("pretrain", output_prefix=tmp_path / "whole" / "a", **flags)
    seconds = time.monotonic() - started
    kills = taken_up = 0
    for share in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9):
        process = start("pretrain", output_prefix=tmp_path / "broken" / "a", **flags)
        time.sleep(seconds * share)
        kills += process.poll() is None
        process.kill()
        taken_up += "is there from an earlier run" in process.communicate()[1]
        finals = list((tmp_path / "broken").glob("a_*")) if (tmp_path / "broken").exists() else []
        assert not finals or {path.suffix for path in finals} >= {".bin"}
    assert kills >= 2 and taken_up >= 1
    run("pretrain", output_prefix=tmp_path / "broken" / "a", **flags)
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def test_a_second_run_reuses_what_is_done(tmp_path: Path, qwen: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", chats(5))
    flags = {"input": path, "output_prefix": tmp_path / "out" / "a", "tokenizer_path": qwen}
    run("sft", **flags)
    before = files(tmp_path / "out")
    _, err = run("sft", **flags)
    assert "is finished already" in err and files(tmp_path / "out") == before
    _, err = run("sft", expect=2, loss_on="turn", **flags)
    assert "tells of other input, tokenizer or settings (loss_on): remove it" in err


def test_a_full_disk_is_told_and_nothing_has_a_final_name(tmp_path: Path, qwen: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts(4000)])
    limited = 'ulimit -f 100; exec "$0" -m common.preprocess pretrain "$@"'  # KiB a file, as if no more were free
    words = ["--input", path, "--output-prefix", tmp_path / "out" / "a", "--tokenizer-path", qwen, "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", limited, sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "cannot be written: [Errno 27] File too large" in done.stderr
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["a.parts", "lock"]


def test_the_command_loads_no_model_library() -> None:
    program = (
        "import sys, common.preprocess; print([m for m in ('torch', 'megatron', 'transformers') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


PRETRAIN_MISTAKES = {
    "field": ([{"text": "a"}, {"txt": "a"}], {}, r"a.jsonl, line 2: it has no field 'text'; its fields are 'txt'"),
    "key": ([{"text": "a"}], {"json_key": "body"}, "a.jsonl, line 1: it has no field 'body'"),
    "no string": ([{"text": ["a"]}], {}, "a.jsonl, line 1: field 'text' holds a JSON array, not a string"),
    "empty": ([], {}, "a.jsonl is empty"),
    "workers": ([{"text": "a"}], {"workers": 0}, "WORKERS=0: it must be at least 1"),
    "partitions": ([{"text": "a"}], {"partitions": 0}, "PARTITIONS=0: it must be at least 1"),
    "eod": ([{"text": "a"}], {"eod_token": "no token"}, "EOD_TOKEN=no token is"),
    "input": ([{"text": "a"}], {"input": "/nowhere.jsonl"}, "INPUT: /nowhere.jsonl does not exist"),
    "tokenizer": ([{"text": "a"}], {"tokenizer_path": "/nowhere"}, "TOKENIZER_PATH=/nowhere is no folder"),
    "output": ([{"text": "a"}], {"output_prefix": f"{__file__}/x/a"}, "nothing can be written to"),
    "folder": ([{"text": "a"}], {"output_prefix": "/tmp/"}, "OUTPUT_PREFIX=/tmp/ is a folder"),
}


@pytest.mark.parametrize("name", PRETRAIN_MISTAKES)
def test_wrong_use_of_pretrain_gets_one_message(tmp_path: Path, qwen: Path, name: str) -> None:
    rows, flags, told = PRETRAIN_MISTAKES[name]
    path = write_rows(tmp_path / "a.jsonl", rows)
    flags = {"input": path, "output_prefix": tmp_path / "out" / "a", "tokenizer_path": qwen, "workers": 2, **flags}
    _, err = run("pretrain", expect=2, **flags)
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert told in error and "Traceback" not in err
    assert not list((tmp_path / "out").glob("a_*")) and not (tmp_path / "out" / "a.json").exists()


def test_wrong_use_of_sft_gets_one_message(tmp_path: Path, qwen: Path) -> None:
    flags = {"output_prefix": tmp_path / "out" / "a", "tokenizer_path": qwen, "workers": 1}
    mixed = write_rows(tmp_path / "mixed.jsonl", [*chats(2), {"messages": [{"role": "user", "content": "q"}]}])
    _, err = run("sft", expect=2, input=mixed, **flags)
    assert "mixed.jsonl, line 3: it is of format messages, the first row of instruction" in err
    unknown = write_rows(tmp_path / "unknown.jsonl", [{"text": "a"}])
    _, err = run("sft", expect=2, input=unknown, **flags, check=True)
    assert "unknown.jsonl, line 1: its fields 'text' are of no known format" in err
    _, err = run("sft", expect=2, input=mixed, **flags, roles="user")
    assert "--roles: invalid choice: 'user'" in err
    assert not list((tmp_path / "out").glob("a_*"))
