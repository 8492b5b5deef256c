"""docs/en/settings.md and docs/zh/settings.md are what tests/settings_table.py makes of the scripts and settings."""

import re
import subprocess
from pathlib import Path

import pytest

from common.settings import declared
from tests.settings_table import LANGUAGES, MEGATRON, ROOT, STEPS, VENDORS, Setting, defaults, page, read, side, values


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_is_written_from_the_code_as_it_is(language: str) -> None:
    written = (ROOT / "docs" / language / "settings.md").read_text(encoding="utf-8")
    assert written == page(language), "write it again: python -m tests.settings_table"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_setting_of_every_script_has_one_row_under_its_script(language: str) -> None:
    parts = page(language).split("\n## ")[1:]
    assert [part.splitlines()[0] for part in parts[:-1]] == list(STEPS)
    for script, part in zip(STEPS, parts, strict=False):
        rows = re.findall(r"^\| `(\w+)` ", part, re.M)
        assert len(rows) == len(set(rows)) and set(rows) == declared(f"nvidia/{script}") > set()
    assert set(re.findall(r"^\| `(\w+)` ", parts[-1], re.M)) == declared("*/env.sh", "common/shell/lib.sh")


def test_the_default_of_each_vendor_is_the_one_that_its_help_prints() -> None:
    of_vendors = {vendor: read(ROOT / vendor / "3_run_mcore_qwen.sh") for vendor in VENDORS}
    assert defaults("TRANSFORMER_IMPL", of_vendors) == "`transformer_engine`; metax `local`; cpu `local`"
    for vendor in VENDORS:
        done = subprocess.run(
            ["bash", ROOT / vendor / "3_run_mcore_qwen.sh", "--help"], capture_output=True, text=True, check=True
        )
        printed = dict(re.findall(r"^  ([A-Z0-9_]+)=(\S+)  ", done.stdout, re.M))
        assert {each.name: each.default for each in of_vendors[vendor] if each.default}.items() <= printed.items()


def test_values_are_choices_or_the_kind_that_help_shows() -> None:
    (settings,) = STEPS["3_run_mcore_qwen.sh"]
    assert values("OPTIMIZER_STATE", (settings,)) == "fp32, bf16, cpu, cpu_bf16"
    assert values("LR", (settings,)) == "X" and values("PACKING", (settings,)) == "true|false|auto"
    with pytest.raises(KeyError):
        values("LEARNING_RATE", (settings,))


def test_both_languages_have_their_own_effects() -> None:
    settings = [each for script in STEPS for each in read(ROOT / "nvidia" / script)]
    assert len(settings) > 100
    assert [each.name for each in settings if re.search("[一-鿿]", side(each.effect, "en"))] == []
    assert [each.name for each in settings if not re.search("[一-鿿]", side(each.effect, "zh"))] == []


def test_megatrons_names_belong_to_settings() -> None:
    for script, names in MEGATRON.items():
        assert names.keys() <= {each.name for each in read(ROOT / "nvidia" / script)}


def test_a_line_is_read_into_its_parts(tmp_path: Path) -> None:
    script = tmp_path / "1_x.sh"
    script.write_text('# Data / 数据\n: "${TP:=2}"   # tensor / 张量 / 并行\n: "${EMPTY:=}" # nothing\n')
    assert read(script) == [
        Setting("TP", "2", "tensor / 张量 / 并行", "Data / 数据"), Setting("EMPTY", "", "nothing", "Data / 数据"),
    ]  # fmt: skip
    assert side("tensor / 张量 / 并行", "zh") == "张量 / 并行" and side("nothing", "zh") == "nothing"
