"""Installed versions for tests: real folders on sys.path."""

import sys
from pathlib import Path

import pytest


def install(folder: Path, version: str, monkeypatch: pytest.MonkeyPatch, name: str = "megatron-core") -> None:
    """Makes `version` the one that Python's own package metadata finds."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(folder)])
