"""A model's id where a folder is expected: fetched by Hugging Face's client, here from a small hub of our own."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from common.errors import KitError
from common.hub import ID, local_folder
from tests.tiny import tiny_qwen

ROOT = Path(__file__).parents[2]
REPOSITORY, REVISION = "Some-Org/tiny-qwen2.5", "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The parts of https://huggingface.co that a download needs; the server has `folder` and `requests`."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path, folder = self.path.split("?")[0], self.server.folder  # type: ignore[attr-defined]
        self.server.requests.append(path)  # type: ignore[attr-defined]
        files = sorted(each.name for each in folder.iterdir())
        if path in (f"/api/models/{REPOSITORY}", f"/api/models/{REPOSITORY}/revision/main"):
            siblings = [{"rfilename": name} for name in files]
            self._send(json.dumps({"id": REPOSITORY, "sha": REVISION, "siblings": siblings}).encode(), body, {})
        elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            sizes = {name: (folder / name).stat().st_size for name in files}
            tree = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
            self._send(json.dumps(tree).encode(), body, {})
        elif path.startswith(f"/{REPOSITORY}/resolve/") and path.split("/")[-1] in files:
            content = (folder / path.split("/")[-1]).read_bytes()
            tag = hashlib.sha256(content).hexdigest()
            self._send(content, body, {"ETag": f'"{tag}"', "X-Repo-Commit": REVISION})
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, content: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder = tiny_qwen(tmp_path_factory.mktemp("hub") / "qwen")  # type: ignore[attr-defined]
    (server.folder / "model.safetensors.index.json").write_text("{}")  # type: ignore[attr-defined]
    server.requests = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHON": sys.executable, **more}


def test_step_1_fetches_a_tokenizer_by_its_id_and_keeps_it(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "the quick brown fox"}\n')
    settings = {"INPUT": "rows.jsonl", "OUTPUT_PREFIX": "data", "TOKENIZER_PATH": REPOSITORY, "WORKERS": "1"}
    command = ["bash", str(ROOT / "cpu" / "1_preprocess_pretrain.sh")]
    for endpoint in (f"http://127.0.0.1:{hub.server_port}", "http://127.0.0.1:1"):  # the second: no network
        given = environment(endpoint, tmp_path / "home", **settings)
        done = subprocess.run(command, env=given, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"TOKENIZER_PATH={REPOSITORY} is in {tmp_path / 'home'}" in done.stderr and REVISION in done.stderr
        for path in tmp_path.glob("data*"):
            path.unlink()
    fetched = {path.name for path in (tmp_path / "home").rglob("snapshots/*/*")}
    assert {"tokenizer.json", "config.json"} <= fetched and not [name for name in fetched if "safetensors" in name]


def test_step_2_fetches_the_weights_too(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    (hub.folder / "model.safetensors.index.json").unlink()  # type: ignore[attr-defined]
    settings = {
        "CONVERT_TYPE": "huggingface-to-megatron", "LOAD_CHECKPOINT_PATH": REPOSITORY, "SAVE_CHECKPOINT_PATH": "start",
    }  # fmt: skip
    given = environment(f"http://127.0.0.1:{hub.server_port}", tmp_path / "home", **settings)
    command = ["bash", str(ROOT / "cpu" / "2_convert_between_hf_megatron.sh")]
    done = subprocess.run(command, env=given, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "all bits agree" in done.stderr, done.stderr


def test_the_estimate_fetches_a_config_alone(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    words = ["-m", "common.estimate", "--hf-model-path", REPOSITORY, "--gpu", "H100", "--seq-length", "128"]
    given = environment(f"http://127.0.0.1:{hub.server_port}", tmp_path / "home")
    done = subprocess.run([sys.executable, *words], env=given, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "home").rglob("snapshots/*/*")} == {"config.json"}


@pytest.mark.parametrize("known", [True, False], ids=["no network", "no such model"])
def test_what_cannot_be_fetched_says_how_to_bring_it(hub: ThreadingHTTPServer, tmp_path: Path, known: bool) -> None:
    endpoint = "http://127.0.0.1:1" if known else f"http://127.0.0.1:{hub.server_port}"
    words = ["-m", "common.estimate", "--hf-model-path", "Some-Org/other", "--gpu", "H100"]
    given = environment(endpoint, tmp_path / "home")
    done = subprocess.run([sys.executable, *words], env=given, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: HF_MODEL_PATH=Some-Org/other is no folder here, and cannot be fetched (")
    assert last.endswith(
        "): correct the path, or run `hf download Some-Org/other --local-dir FOLDER` (a mirror: HF_ENDPOINT) on a"
        " machine with a network, copy FOLDER here, and set HF_MODEL_PATH to it"
    )


def test_an_existing_path_is_never_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen2.5-7B").mkdir(parents=True)
    assert local_folder("Qwen/Qwen2.5-7B", "HF_MODEL_PATH", "model") == "Qwen/Qwen2.5-7B"


@pytest.mark.parametrize("text", ["/models/Qwen", "./Qwen/Qwen2.5-7B", "models", "a/b/c", "../a", "a/", "~/a", "a b/c"])
def test_a_path_that_is_missing_is_left_to_its_reader(text: str) -> None:
    assert not ID.fullmatch(text) and local_folder(text, "HF_MODEL_PATH", "model") == text


def test_modelscopes_client_is_used_where_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub of the client's interface (modelscope/hub/snapshot_download.py); the site itself was not tried."""
    with pytest.raises(KitError, match=r"modelscope is not installed: pip install modelscope, or run `modelscope down"):
        local_folder("modelscope:Qwen/Qwen2.5-7B", "TOKENIZER_PATH", "tokenizer")
    (tmp_path / "modelscope.py").write_text(
        "def snapshot_download(model_id, *, allow_patterns, ignore_patterns=None):\n"
        "    assert allow_patterns and ignore_patterns\n"
        "    return '/fetched/' + model_id\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert local_folder("modelscope:Qwen/Qwen2.5-7B", "TOKENIZER_PATH", "tokenizer") == "/fetched/Qwen/Qwen2.5-7B"
