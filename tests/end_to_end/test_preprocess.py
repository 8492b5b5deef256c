"""`python -m common.preprocess` as users run it, judged by Megatron-Core's reader and by the tokenizer."""

import gzip
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from common.data.dataset.indexed_dataset import IndexedDatasetBuilder
from common.data.tokenizer.text_tokenizer import load_tokenizer
from tests.end_to_end.steps import chats, files, run, texts, write_rows
from tests.tiny import tiny_qwen

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen(tmp_path_factory.mktemp("qwen"))


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
    assert "dropped 15 documents: no text" in err and "MB/s" in err and "\r" not in err


def test_documents_of_any_size_and_content_come_back(tmp_path: Path, qwen: Path) -> None:
    """Empty ones, one that fits no memory that workers share, NUL, line ends, marks of order, four-byte characters."""
    odd = ["", "\x00", "\r\n\r", "\ufeffa\ufeff", "e\u0301", "\U0001f469\u200d\U0001f469", " " * 1000, "\u2028\x85"]
    documents = [*odd, "ab 12 你好\n" * 1_000_000, *odd, "last"]
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=bool(i % 2)) for i, text in enumerate(documents)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    run("pretrain", input=path, output_prefix=tmp_path / "a", tokenizer_path=qwen, workers=2)
    tokenizer = load_tokenizer(qwen)
    theirs = IndexedDataset(str(tmp_path / "a_text_document"))
    found = [tokenizer.decode(theirs[i][:-1].tolist()) for i in range(len(theirs))]
    assert found == [unicodedata.normalize("NFC", text) for text in documents if text]


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
        messages = [{"role": role, "content": content} for role, content in turns if content]
        assert tokenizer.decode(tokens[i]) == tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(tokens[i][mask[i] == 1]) == row["output"] + "<|im_end|>"
        assert set(mask[i].tolist()) == {0, 1}
    too_long = sum(len(tokens[i]) > 31 for i in range(30))
    assert f" {too_long} of 30 samples have more than SEQ_LENGTH + 1 = 31 tokens" in err
    longest = max(len(tokens[i]) for i in range(30))
    _, err = run("sft", **{**flags, "seq_length": longest - 1})
    assert f" 0 of 30 samples have more than SEQ_LENGTH + 1 = {longest} tokens" in err
    long = [{"instruction": "", "input": "a", "output": "12 " * words} for words in (1, 1000, 2000)]
    flags |= {"input": write_rows(tmp_path / "long.jsonl", long), "output_prefix": tmp_path / "long"}
    del flags["seq_length"]
    _, err = run("sft", **flags)
    assert "2 of 3 samples have more than SEQ_LENGTH + 1 = 2049 tokens; 1 of 3" in err and "8193" not in err
    assert "samples have more" not in run("sft", **{**flags, "input": path, "output_prefix": tmp_path / "short"})[1]
    out, _ = run("show", data=tmp_path / "a", tokenizer_path=qwen, index=1, count=1)
    assert "Be brief.<|im_end|>" in out and "⟦It is 2。<|im_end|>⟧" in out


def test_parts_on_machines_of_their_own_and_merge(tmp_path: Path, qwen: Path) -> None:
    rows = [{"text": text} for text in texts(300)]
    write_rows(tmp_path / "b.jsonl", rows[:200])
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows[200:])
    flags = {"input": f"{tmp_path}/b.jsonl {tmp_path}/a.jsonl.gz", "tokenizer_path": qwen, "workers": 1}
    run("pretrain", output_prefix=tmp_path / "whole" / "a", **flags)
    out = tmp_path / "out" / "a"
    for index in (2, 0):
        _, err = run("pretrain", output_prefix=out, partitions=3, partition_index=index, **flags)
        assert f"wrote partition {index + 1} of 3: " in err and "common.preprocess merge" in err
    _, err = run("merge", expect=2, output_prefix=out)
    assert "1 of 3 partitions are not finished in " in err and "run PARTITION_INDEX=1" in err
    run("pretrain", output_prefix=out, partitions=3, partition_index=1, **flags)
    assert "ok: the partitions of" in run("merge", output_prefix=out, check=True)[0]
    assert "300 documents" not in run("merge", output_prefix=out)[1]
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    _, err = run("pretrain", expect=2, output_prefix=out, partitions=3, partition_index=3, **flags)
    assert "PARTITION_INDEX=3: it must lie between 0 and PARTITIONS - 1 = 2" in err


def test_show_stats_and_the_old_kits_data(tmp_path: Path, qwen: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", chats(40))
    run("sft", input=path, output_prefix=tmp_path / "a", tokenizer_path=qwen, workers=1)
    data = {"data": tmp_path / "a"}
    first, _ = run("show", **data, tokenizer_path=qwen, count=5)
    again, _ = run("show", **data, tokenizer_path=qwen, count=5, seed=0)
    other, _ = run("show", **data, tokenizer_path=qwen, count=5, seed=1, ids="true")
    assert first == again and first.count("--- document") == 5
    assert [line for line in other.splitlines() if line.startswith("---")] != first.splitlines()[::5]
    tokens, mask = (
        IndexedDataset(str(tmp_path / "a_text_document")),
        IndexedDataset(str(tmp_path / "a_loss_mask_document")),
    )
    number = int(other.split()[2])
    ids = " ".join(f"⟦{i}⟧" if m else str(i) for i, m in zip(tokens[number], mask[number], strict=True))
    assert ids in other.splitlines()
    output, _ = run("stats", **data, seq_lengths="64,256", global_batch_size=4)
    assert '"sft" data, 40 documents' in output and "supervised: " in output and "SEQ_LENGTH=256: 0 too long" in output
    _, err = run("stats", **data, expect=2, seq_lengths="64,x")
    assert "SEQ_LENGTHS=64,x: give integers separated by commas" in err
    with IndexedDatasetBuilder(tmp_path / "old", "<i4") as writer:
        writer.add_document([5, 6, -8, 0, -100, 7, -100, -100])
    run("import-legacy", input=tmp_path / "old", output_prefix=tmp_path / "new", tokenizer_path=qwen)
    out, _ = run("show", data=tmp_path / "new", tokenizer_path=qwen, index=0, ids="true")
    assert out.splitlines()[-1] == "5 6 ⟦7⟧"


def test_a_second_run_reuses_what_is_done(tmp_path: Path, qwen: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", chats(5))
    flags = {"input": path, "output_prefix": tmp_path / "out" / "a", "tokenizer_path": qwen}
    run("sft", **flags)
    before = files(tmp_path / "out")
    _, err = run("sft", **flags)
    assert "is already finished" in err and files(tmp_path / "out") == before
    _, err = run("sft", expect=2, loss_on="turn", **flags)
    assert "has other input, tokenizer or settings (loss_on): remove it" in err


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
    "tokenizer": ([{"text": "a"}], {"tokenizer_path": "/nowhere"}, "TOKENIZER_PATH=/nowhere is not a folder"),
    "output": ([{"text": "a"}], {"output_prefix": f"{__file__}/x/a"}, "nothing can be written to"),
    "folder": ([{"text": "a"}], {"output_prefix": "/tmp/"}, "OUTPUT_PREFIX=/tmp/ is a folder"),
}


@pytest.mark.parametrize("name", PRETRAIN_MISTAKES)
def test_wrong_use_of_pretrain_gets_one_message(tmp_path: Path, qwen: Path, name: str) -> None:
    rows, flags, message = PRETRAIN_MISTAKES[name]
    path = write_rows(tmp_path / "a.jsonl", rows)
    flags = {"input": path, "output_prefix": tmp_path / "out" / "a", "tokenizer_path": qwen, "workers": 2, **flags}
    _, err = run("pretrain", expect=2, **flags)
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in error and "Traceback" not in err
    assert not list((tmp_path / "out").glob("a_*")) and not (tmp_path / "out" / "a.json").exists()


def test_wrong_use_of_sft_gets_one_message(tmp_path: Path, qwen: Path) -> None:
    flags = {"output_prefix": tmp_path / "out" / "a", "tokenizer_path": qwen, "workers": 1}
    mixed = write_rows(tmp_path / "mixed.jsonl", [*chats(2), {"messages": [{"role": "user", "content": "q"}]}])
    _, err = run("sft", expect=2, input=mixed, **flags)
    assert "mixed.jsonl, line 3: it is of format messages, the first row of instruction" in err
    unknown = write_rows(tmp_path / "unknown.jsonl", [{"text": "a"}])
    _, err = run("sft", expect=2, input=unknown, **flags, check=True)
    assert "unknown.jsonl, line 1: its fields 'text' match no known format" in err
    _, err = run("sft", expect=2, input=mixed, **flags, roles="user")
    assert "--roles: invalid choice: 'user'" in err
    assert not list((tmp_path / "out").glob("a_*"))
