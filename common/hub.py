"""A model's id at Hugging Face or ModelScope where a folder is expected: fetched by their own clients."""

import importlib
import re
from pathlib import Path
from typing import Any

from common.errors import KitError
from common.log import logger

MODELSCOPE = "modelscope:"
ID = re.compile(rf"(?:{MODELSCOPE})?[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What is fetched for each purpose, as the clients' patterns.
FILES = {
    "config": ["config.json"],
    "tokenizer": ["*.json", "*.jinja", "merges.txt", "LICENSE*"],
    "model": ["*.json", "*.jinja", "merges.txt", "LICENSE*", "*.safetensors"],
}
WITHOUT = ["*.safetensors.index.json"]  # of "tokenizer": the index of files that are not there


def local_folder(text: str, name: str, purpose: str) -> str:
    """`text` if it is a path; the folder of the fetched files if it is an id such as Qwen/Qwen2.5-7B.

    name: the setting's. purpose: a key of FILES. An existing path is never taken for an id. The clients keep what they
    fetched, and look for a newer revision when the network is there. Raises KitError where nothing can be fetched.
    """
    if Path(text).exists() or not ID.fullmatch(text):
        return text
    site, repository = ("modelscope", text.removeprefix(MODELSCOPE)) if text.startswith(MODELSCOPE) else ("hf", text)
    try:
        folder = _from_modelscope(repository, purpose) if site == "modelscope" else _from_hugging_face(text, purpose)
    except ImportError as error:
        remedy = f"pip install {error.name}, or {_by_hand(site, repository, name)}"
        raise KitError(f"{name}={text}: {error.name} is not installed: {remedy}") from error
    except Exception as error:  # of an HTTP client, a cache, a disk: no common base
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise KitError(
            f"{name}={text} is no folder here, and cannot be fetched ({reason}): correct the path, or"
            f" {_by_hand(site, repository, name)}"
        ) from error
    logger.info("%s=%s is in %s", name, text, folder)
    return folder


def _from_hugging_face(repository: str, purpose: str) -> str:
    from huggingface_hub import snapshot_download

    without = WITHOUT if purpose == "tokenizer" else None
    return str(snapshot_download(repository, allow_patterns=FILES[purpose], ignore_patterns=without))


def _from_modelscope(repository: str, purpose: str) -> str:
    client = importlib.import_module("modelscope")  # optional
    options: dict[str, Any] = {"allow_patterns": FILES[purpose]}
    if purpose == "tokenizer":
        options["ignore_patterns"] = WITHOUT
    return str(client.snapshot_download(repository, **options))


def _by_hand(site: str, repository: str, name: str) -> str:
    """How to fetch it where the network is."""
    client = {
        "hf": f"`hf download {repository} --local-dir FOLDER` (a mirror: HF_ENDPOINT)",
        "modelscope": f"`modelscope download --model {repository} --local_dir FOLDER`",
    }[site]
    return f"run {client} on a machine with a network, copy FOLDER here, and set {name} to it"
