"""What a command prints and how it exits when something is wrong."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common import errors, start
from common.errors import KitError

ROOT = Path(__file__).parents[2]


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def test_a_mistake_of_the_user_is_one_message_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        errors.run(raising(KitError("TP=3: it must divide 8: use 2")))
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "error: TP=3: it must divide 8: use 2\n")


def test_ctrl_c_prints_a_word_and_exits_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        errors.run(raising(KeyboardInterrupt()))
    assert ended.value.code == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize("error", [ValueError("ours"), SystemExit(7)], ids=repr)
def test_internal_errors_pass_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised:
        errors.run(raising(error))
    assert raised.value is error


def test_success_exits_silently(capsys: pytest.CaptureFixture[str]) -> None:
    errors.run(lambda: None)
    assert capsys.readouterr() == ("", "")


def test_a_command_collects_garbage_once_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["-m"])  # what Python sets while it imports the module of `python -m`
    start.pause_collection()
    assert not gc.isenabled()
    enabled: list[bool] = []
    errors.run(lambda: enabled.append(gc.isenabled()))
    assert enabled == [True]


def test_a_command_refuses_without_a_traceback() -> None:
    words = [
        "common.preprocess",
        "pretrain",
        "--input=/nowhere",
        "--output-prefix=/nowhere/a",
        "--tokenizer-path=/nowhere",
    ]
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr and "/nowhere" in done.stderr


def ended(body: str, folder: Path, **more: str) -> subprocess.CompletedProcess[bytes]:
    """A process in `folder` whose main is `body`."""
    program = (
        "import os, pathlib, resource\nfrom common import errors\ndef main():\n    " + body + "\nerrors.run(main)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **more},
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("open('nowhere/a')", b"error: nowhere/a: No such file or directory: check the path, and that its"),
        ("os.mkdir('file/a')", b"error: file/a: Not a directory: check the path, or give another one"),
        ("open('.', 'w')", b"error: .: Is a directory: check the path, or give another one"),
        ("open('x' * 300)", b"error: " + b"x" * 300 + b": File name too long: give a shorter path: most file"),
        ("open('loop')", b"error: loop: Too many levels of symbolic links: a symbolic link points back to itself"),
        ("pathlib.Path('loop').resolve(); open('loop')", b"loop: Too many levels of symbolic links: a symbolic link"),
        ("stream = open('/dev/full', 'wb', 0); stream.write(b'x')", b"error: No space left on device: free some space"),
        ("os.replace('file', 'nowhere/b')", b"error: file -> nowhere/b: No such file or directory: "),
        (
            "resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4)); [open('file') for _ in range(9)]",
            b"error: file: Too many open files: raise the limit on open files: ulimit -n 65536",
        ),
        ("open(b'\\xca\\xfd')", b"error: \\udcca\\udcfd: No such file or directory: "),
    ],
)  # fmt: skip
def test_what_the_system_refuses_is_one_line_with_path_cause_and_remedy(
    tmp_path: Path, body: str, message: bytes
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    done = ended(body, tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1), done.stderr
    assert message in done.stderr


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ("EDQUOT", "Disk quota exceeded: your quota is used up: free some space (quota -s), then run the same command"),
        ("ESTALE", "Stale file handle: the network file system lost it: check the mount, then run the same command"),
        ("EIO", "Input/output error: the disk or the network file system failed: see dmesg, then run the same command"),
        ("EROFS", "Read-only file system: remount it read-write, or give a path on another file system"),
        ("EACCES", "Permission denied: ask its owner for access (chmod, chown), or give another path"),
    ],
)
def test_what_only_other_disks_refuse_has_its_remedy_too(tmp_path: Path, number: str, message: str) -> None:
    error = f"OSError(getattr(errno, {number!r}), os.strerror(getattr(errno, {number!r})), 'there')"
    done = ended(f"import errno; raise {error}", tmp_path)
    assert done.returncode == 2 and done.stderr.decode().startswith(f"error: there: {message}")


def test_a_block_adds_its_path_to_an_error_without_one(tmp_path: Path) -> None:
    done = ended("with errors.writing('a'), open('/dev/full', 'wb', 0) as stream: stream.write(b'x')", tmp_path)
    assert done.stderr.startswith(b"error: a cannot be written: No space left on device: free some space"), done.stderr
    done = ended("with errors.reading('a'): open('/proc/self/mem', 'rb', 0).read(1)", tmp_path)
    assert done.stderr.startswith(b"error: a cannot be read: Input/output error: the disk or the"), done.stderr
    done = ended("with errors.reading('a'): open('a')", tmp_path)
    assert done.stderr.startswith(b"error: a cannot be read: No such file or directory: check"), done.stderr
    done = ended("with errors.writing('a'): os.mkdir('b/c')", tmp_path)
    assert done.stderr.startswith(b"error: a cannot be written: b/c: No such file or directory: check"), done.stderr


def test_what_an_error_of_the_kits_own_adds_is_shown(tmp_path: Path) -> None:
    done = ended("import errno; raise OSError(errno.ENOSPC, '1 GB is free', 'a')", tmp_path)
    assert done.stderr.startswith(b"error: a: No space left on device (1 GB is free): free some space"), done.stderr


@pytest.mark.parametrize("body", ["raise OSError('of ours')", "raise RuntimeError('of ours')", "1 / 0"])
def test_an_error_without_a_path_or_cause_keeps_its_traceback(tmp_path: Path, body: str) -> None:
    done = ended(body, tmp_path)
    assert done.returncode == 1 and b"Traceback" in done.stderr


def test_a_closed_socket_is_not_treated_as_a_closed_pipe(tmp_path: Path) -> None:
    done = ended("import socket; a, b = socket.socketpair(); b.close(); a.send(b'x'); a.send(b'x')", tmp_path)
    assert done.returncode == 1 and b"BrokenPipeError" in done.stderr


def test_a_closed_pipe_ends_a_command_silently(tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from common import errors
errors.run(lambda: [print(number) for number in range(100000)])
"""
    (tmp_path / "lines.py").write_text(program)
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} lines.py | head -n 1; echo ${{PIPESTATUS[0]}}"], cwd=tmp_path,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("0\n141\n", "")


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", rb"\u6570 \U0001f600"), ("gbk", b"\xca\xfd \\U0001f600")])
def test_unprintable_characters_are_escaped(tmp_path: Path, encoding: str, shown: bytes) -> None:
    body = "print('\u6570 \U0001f600'); raise errors.KitError('\u6570 \U0001f600')"
    done = ended(body, tmp_path, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (2, shown + b"\n", b"error: " + shown + b"\n")


@pytest.mark.parametrize("module", ["argparse", "json", "common"])
def test_the_kit_starts_its_own_modules_whatever_the_working_directory_holds(tmp_path: Path, module: str) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / f"{module}.py").write_text("raise SystemExit('not the one that is meant')\n")
    program = """
from pathlib import Path
from common.doctor import probes
print(probes.run(["nothing"]), Path.cwd())
"""
    (tmp_path / "start.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KIT_PLATFORM": "cpu"}
    environment.pop("PYTHONSAFEPATH", None)  # as before Python 3.11
    done = subprocess.run(
        [sys.executable, "../start.py"], cwd=tmp_path / "own", env=environment, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == f"{{'nothing': (False, \"KeyError: 'nothing'\")}} {tmp_path / 'own'}\n", done


def test_a_deleted_folder_is_reported(tmp_path: Path) -> None:
    done = ended("pass", tmp_path, KIT_CWD=str(tmp_path / "gone"))
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert b"gone cannot be entered (No such file or directory)" in done.stderr


def test_a_message_cannot_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        errors.run(raising(KitError("role '\x1b[2J\u202e' is none\n\tof 你")))
    assert capsys.readouterr().err == "error: role '\\x1b[2J\\u202e' is none\n\tof 你\n"


def test_another_broken_pipe_is_an_internal_error() -> None:
    with pytest.raises(BrokenPipeError):
        errors.run(raising(BrokenPipeError()))
