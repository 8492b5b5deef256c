"""A dataclass becomes a command line, and a command line the dataclass again."""

import argparse
import dataclasses
from dataclasses import dataclass

import pytest

from common.preprocess import PretrainSettings, SftSettings
from common.settings import add_options, from_namespace, option, to_flags
from common.training.config import TrainSettings


@dataclass(frozen=True)
class Example:
    """One field of each kind."""

    data_path: str = option(help="where 100% of the data is")
    append_eod: bool = option(True, "whether it ends")
    micro_batch_size: int = option(2, "samples")
    lr: float = option(6.5e-5)
    epochs: float | None = option(None, "passes")
    seq_length: int | None = option(None)
    name: str | None = option(None)
    mode: str = option("train", "what to do", ("train", "convert"))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="x")
    add_options(made, Example)
    return made


def parse(*words: str) -> Example:
    return from_namespace(Example, parser().parse_args(words))


def test_what_is_not_given_has_its_default() -> None:
    assert parse("--data-path", "a") == Example("a")


def test_every_kind_of_value_is_read() -> None:
    words = "--data-path a --append-eod false --micro-batch-size 4 --lr 1e-3 --epochs 0.5 --seq-length 8 --name b"
    read = parse(*words.split(), "--mode", "convert")
    assert read == Example("a", False, 4, 1e-3, 0.5, 8, "b", "convert")
    assert [type(value) for value in dataclasses.astuple(read)] == [str, bool, int, float, float, int, str, str]


@pytest.mark.parametrize("text, value", [("true", True), ("True", True), ("FALSE", False)])
def test_true_and_false_are_read_in_any_case(text: str, value: bool) -> None:
    assert parse("--data-path=a", f"--append-eod={text}").append_eod is value


def test_the_last_of_two_values_counts() -> None:
    assert parse("--data-path=a", "--lr=1", "--lr=2").lr == 2.0


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "--data-path"),
        (["--data-path=a", "--append-eod=1"], "'1' is neither true nor false"),
        (["--data-path=a", "--micro-batch-size=2.5"], "--micro-batch-size"),
        (["--data-path=a", "--mode=trian"], "trian"),
        (["--data-path=a", "--unknown=1"], "--unknown"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_help_tells_defaults_choices_and_kinds() -> None:
    text = " ".join(parser().format_help().split())
    assert "--data-path TEXT where 100% of the data is --append-eod" in text  # required: no default to tell
    assert "--append-eod true|false whether it ends (default: true)" in text
    assert "--micro-batch-size N samples (default: 2)" in text
    assert "--lr X (default: 6.5e-05)" in text
    assert "--epochs X passes --seq-length N" in text  # None is no default worth telling
    assert "--mode {train,convert} what to do (default: train)" in text


@pytest.mark.parametrize(
    "settings",
    [
        Example("a"),
        Example("a b/it's", False, 3, 1 / 3, 1e-9, 7, "", "convert"),
        Example("-a", name="--lr"),
        Example("a=b", micro_batch_size=-1, lr=-1e-5),
    ],
    ids=str,
)
def test_the_flags_of_settings_give_them_again(settings: Example) -> None:
    assert parse(*to_flags(settings)) == settings


def test_a_processes_flags_give_the_launchers_settings_again() -> None:
    settings = TrainSettings(
        save_checkpoint_path="s", dataset_path="d", epochs=0.1, lr=1 / 3, packing=True, train_mode="finetune"
    )
    made = argparse.ArgumentParser()
    add_options(made, TrainSettings)
    assert from_namespace(TrainSettings, made.parse_args(to_flags(settings))) == settings


@pytest.mark.parametrize("kind", [TrainSettings, PretrainSettings, SftSettings])
def test_every_default_is_one_of_its_choices(kind: type) -> None:
    for field in dataclasses.fields(kind):
        choices = field.metadata["choices"]
        assert not choices or field.default in (*choices, None), field.name
