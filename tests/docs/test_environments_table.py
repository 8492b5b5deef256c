"""docs/{en,zh}/environments.md are what tests/environments_table.py makes of the kit's checks."""

import re
from pathlib import Path

import pytest

from common.model.shape.config import QwenConfig
from tests.environments_table import LANGUAGES, ROOT, ROWS, accepts, environments, page, pins
from tests.recipes import write_config

NGC_24_03, NGC_25_06, MACA, MACA_3_5, MACA_3_8, HOPPER, CPU = environments()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> QwenConfig:
    return write_config(tmp_path_factory.mktemp("config"), "7B")


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_is_written_from_the_code_as_it_is(language: str) -> None:
    written = (ROOT / "docs" / language / "environments.md").read_text(encoding="utf-8")
    assert written == page(language), "write it again: python -m tests.environments_table"


def test_a_version_of_transformer_engine_decides(qwen: QwenConfig) -> None:
    for row in ("PACKING=true", "OPTIMIZER_STATE=bf16", "TP_COMM_OVERLAP=true"):
        assert not accepts(NGC_24_03, ROWS[row], qwen) and accepts(NGC_25_06, ROWS[row], qwen)
    assert accepts(NGC_24_03, ROWS["PACKING=true"] | {"transformer_impl": "local"}, qwen)


def test_platform_and_megatron_core_decide(qwen: QwenConfig) -> None:
    assert not accepts(MACA, ROWS["PIPELINE_LAYERS=7,7,8,6"], qwen) and accepts(
        CPU, ROWS["PIPELINE_LAYERS=7,7,8,6"], qwen
    )
    assert not accepts(MACA, ROWS["ASYNC_SAVE=true"], qwen)
    assert not accepts(CPU, ROWS["FP8_FORMAT=hybrid FP8_RECIPE=delayed"], qwen)


def test_on_metax_the_image_decides_whether_there_is_transformer_engine(qwen: QwenConfig) -> None:
    engine = {"transformer_impl": "transformer_engine"}
    for row in (engine, engine | ROWS["CP=2"], engine | ROWS["PACKING=true"], ROWS["OPTIMIZER_STATE=bf16"]):
        assert [accepts(each, row, qwen) for each in (MACA, MACA_3_5, MACA_3_8)] == [False, True, False]
    assert all(accepts(each, ROWS["PACKING=true"], qwen) for each in (MACA, MACA_3_5, MACA_3_8))


def test_an_added_package_decides(qwen: QwenConfig) -> None:
    row = ROWS["-- --fused-products true"]
    assert accepts(HOPPER, row, qwen) and not accepts(NGC_25_06, row, qwen)


def test_versions_are_those_of_the_dockerfiles_and_locks() -> None:
    nvidia = (ROOT / "docker" / "nvidia.Dockerfile").read_text()
    assert "BASE_IMAGE=nvcr.io/nvidia/pytorch:24.03-py3\n" in nvidia
    assert f"ARG MEGATRON_CORE={NGC_24_03.megatron}\n" in nvidia
    assert f"BASE_IMAGE=nvcr.io/nvidia/pytorch:25.06-py3 MEGATRON_CORE={NGC_25_06.megatron} " in nvidia
    assert f"megatron-core=={MACA.megatron} " in (ROOT / "requirements" / "metax.txt").read_text()
    metax = (ROOT / "docker" / "metax.Dockerfile").read_text()
    for each, tag in ((MACA_3_5, "ai3.5.3"), (MACA_3_8, ":3.8.0")):
        assert re.search(rf"BASE_IMAGE=\S+{re.escape(tag)}\S+\n#     MEGATRON_CORE={each.megatron} ", metax)
    assert HOPPER.transformer_engine == (2, 11) and CPU.transformer_engine is None


def test_pins_are_read_for_python_3_12(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text('a==1 ; python_version < "3.12"\na==2 ; python_version >= "3.12"\nb-c==1.0b36\n# d==1\n')
    assert pins(lock) == {"a": "2", "b-c": "1.0b36"}


def test_both_readmes_link_the_page() -> None:
    for name in ("README.md", "README.zh-CN.md"):
        links = re.findall(r"\]\((docs/\w\w/environments\.md)\)", (ROOT / name).read_text(encoding="utf-8"))
        assert sorted(links) == ["docs/en/environments.md", "docs/zh/environments.md"]
