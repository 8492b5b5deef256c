"""What is not a JSON object, or is an ambiguous one, is refused, in little time and memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import KitError
from common.json_file import MAX_BYTES, read_json, shown

OBJECT = b'{"a": [1, 2.5, null, true, "\\u4f60\xc3\xa9"], "b": {"c": {}}}'


def read(tmp_path: Path, data: bytes) -> dict[str, object]:
    (tmp_path / "a.json").write_bytes(data)
    return read_json(tmp_path / "a.json", "copy it again")


def test_an_object_is_read_as_json_reads_it(tmp_path: Path) -> None:
    assert read(tmp_path, OBJECT) == json.loads(OBJECT)


REFUSED = {
    "nothing": (b"", "is not valid JSON"),
    "cut short": (OBJECT[:-1], "is not valid JSON"),
    "a list": (b"[1]", "is not a JSON object"),
    "a number": (b"12", "is not a JSON object"),
    "a byte-order mark": (b"\xef\xbb\xbf" + OBJECT, "begins with a byte-order mark"),
    "UTF-16": (OBJECT.decode().encode("utf-16"), "is not valid JSON .*codec can't decode"),
    "Latin-1": (b'{"a": "\xe9"}', "is not valid JSON .*codec can't decode"),
    "NUL": (OBJECT + bytes(9), "is not valid JSON"),
    "half a character": (b'{"a": {"b": ["\\ud800"]}}', "is not valid JSON .*surrogates not allowed"),
    "half a character as a name": (b'{"\\udfff": 1}', "is not valid JSON .*surrogates not allowed"),
    "a name twice": (b'{"b": {"a": 1, "a": 2}}', "is not valid JSON .*'a' is a duplicate key"),
    "a long number": (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON .*a number has 5000 digits"),
    "deep lists": (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "is nested deeper than 64"),
    "very deep lists": (b'{"a": ' + b"[" * 10**6 + b"]" * 10**6 + b"}", "is nested deeper than 64"),
    "very deep objects": (b'{"a":' * 10**6, "is nested deeper than 64"),
    "a large file": (b'{"a": "' + b" " * MAX_BYTES + b'"}', "is larger than 16 MiB"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_anything_else_is_refused(kind: str, tmp_path: Path) -> None:
    data, message = REFUSED[kind]
    with pytest.raises(KitError, match=rf"a\.json {message}"):
        read(tmp_path, data)


def test_a_name_twice_with_the_same_value_means_that_value(tmp_path: Path) -> None:
    assert read(tmp_path, b'{"a": [1], "a": [1]}') == {"a": [1]}


def test_a_folder_and_a_missing_file_are_reported(tmp_path: Path) -> None:
    with pytest.raises(KitError, match=r"cannot be read \(Is a directory\): copy it again"):
        read_json(tmp_path, "copy it again")
    with pytest.raises(KitError, match=r"cannot be read \(No such file or directory\): copy it again"):
        read_json(tmp_path / "a.json", "copy it again")


def test_a_file_without_end_takes_no_memory() -> None:
    code = "import sys, resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30));"
    code += "from pathlib import Path; from common.json_file import read_json; read_json(Path('/dev/zero'), 'mend it')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert "KitError: /dev/zero is larger than 16 MiB: mend it" in done.stderr


def test_a_value_is_shown_in_one_short_line() -> None:
    assert shown("a\x1b[2J\n") == r"'a\x1b[2J\n'" and shown(["x" * 1000]) == "['" + "x" * 95 + "..."
