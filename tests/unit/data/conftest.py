from pathlib import Path

import pytest

from tests.tiny import tiny_qwen


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5 folder with tokenizer and chat template."""
    return tiny_qwen(tmp_path_factory.mktemp("qwen"))
