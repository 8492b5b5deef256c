"""Which steps are run for which settings, and that the commands fit together."""

import json
from pathlib import Path

import pytest

from common.demo.recipe import QuickstartSettings, has_checkpoint, steps_of, work_dir
from common.demo.steps import DECLARED, KIT, Step
from common.errors import KitError
from tests.tiny import tiny_qwen


def sample(work: Path) -> list[Step]:
    return steps_of(QuickstartSettings(seed=7), work, "cpu")


def own(work: Path, folder: Path, *rows: dict[str, str], **more: object) -> list[Step]:
    folder.mkdir(exist_ok=True)
    path = folder / "my rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = tiny_qwen(folder / "model")
    settings = QuickstartSettings(hf_model_path=str(model), input=str(path), **more)  # type: ignore[arg-type]
    return steps_of(settings, work, "cpu")


def test_the_sample_runs_through_all_steps(tmp_path: Path) -> None:
    steps = sample(tmp_path)
    assert [step.name for step in steps] == [
        "sample", "tokens_pretrain", "tokens_finetune", "megatron", "pretrain", "finetune", "torch", "huggingface",
        "answers",
    ]  # fmt: skip
    assert len({step.output for step in steps}) == len(steps)
    assert all(step.output.parent == tmp_path for step in steps)


def test_scripts_declare_every_setting_they_are_given(tmp_path: Path) -> None:
    steps = [
        *sample(tmp_path),
        *own(tmp_path, tmp_path / "a", {"instruction": "a", "output": "b"}, roles="alpaca"),
        *own(tmp_path, tmp_path / "b", {"text": "a"}),
    ]
    scripts = [(KIT / step.command[1], step.settings) for step in steps if step.command[0] == "bash"]
    assert len(scripts) == 7 + 5 + 5
    for path, settings in scripts:
        assert path.is_file()
        assert not settings.keys() - set(DECLARED.findall(path.read_text(encoding="utf-8")))


def test_each_step_reads_what_an_earlier_one_writes(tmp_path: Path) -> None:
    for steps in (sample(tmp_path), own(tmp_path, tmp_path / "a", {"text": "a"})):
        written: set[Path] = {tmp_path / "a"}
        for step in steps:
            read = [
                Path(value)
                for name, value in step.settings.items()
                if name in ("INPUT", "TOKENIZER_PATH", "LOAD_CHECKPOINT_PATH", "DATASET_PATH")
            ]
            words = step.command
            read += [Path(words[i + 1]) for i, word in enumerate(words) if word in ("--before", "--after", "--input")]
            assert step.name == "sample" or read
            assert all(any(path.is_relative_to(each) for each in written) for path in read), step.name
            written.add(step.output)


def test_the_users_conversations_are_for_fine_tuning(tmp_path: Path) -> None:
    row = {"instruction": "", "input": "1+1?", "output": "2"}
    steps = own(tmp_path / "work", tmp_path / "a", row, epochs=2.5, lr=3e-5, truncate="drop", seq_length=64)
    assert [step.name for step in steps] == [
        "tokens_finetune", "megatron", "finetune", "torch", "huggingface", "answers",
    ]  # fmt: skip
    assert {path.name for path in steps[0].reads} >= {"my rows.jsonl", "model.safetensors", "config.json"}
    training = steps[2].settings
    assert (training["EPOCHS"], training["LR"], training["TRUNCATE"]) == ("2.5", "3e-05", "drop")
    assert training["LOAD_CHECKPOINT_PATH"] == str(tmp_path / "work" / "megatron")
    assert steps[2].settings["TRAIN_MODE"] == "finetune" and steps[-1].command[-1] == str(tmp_path / "work" / "answers")


def test_the_users_texts_are_for_pretraining(tmp_path: Path) -> None:
    steps = own(tmp_path / "work", tmp_path / "a", {"text": "abc"})
    assert [step.name for step in steps] == [
        "tokens_pretrain", "megatron", "pretrain", "torch", "huggingface", "answers",
    ]  # fmt: skip
    assert "TRUNCATE" not in steps[2].settings


def test_several_inputs_are_one_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a b.jsonl", "c.jsonl"):
        Path(name).write_text('{"text": "a"}\n')
    settings = QuickstartSettings(hf_model_path=str(tiny_qwen(tmp_path / "model")), input="*.jsonl")
    step = steps_of(settings, tmp_path / "work", "cpu")[0]
    assert step.settings["INPUT"] == f"'{tmp_path}/a b.jsonl' {tmp_path}/c.jsonl"


def test_wrong_use_gets_one_message(tmp_path: Path) -> None:
    with pytest.raises(KitError, match="HF_MODEL_PATH= and INPUT=a.jsonl: set both"):
        QuickstartSettings(input="a.jsonl")
    with pytest.raises(KitError, match="LR=0.5 is for your own data: set HF_MODEL_PATH and INPUT too"):
        QuickstartSettings(lr=0.5)
    with pytest.raises(KitError, match=r"INPUT: /nowhere.jsonl does not exist"):
        steps_of(QuickstartSettings(hf_model_path="a", input="/nowhere.jsonl"), tmp_path, "cpu")


def test_a_foreign_folder_is_not_touched(tmp_path: Path) -> None:
    assert work_dir(QuickstartSettings()) == KIT / "work"
    assert work_dir(QuickstartSettings(work_dir=str(tmp_path))) == tmp_path
    (tmp_path / "steps").mkdir()
    (tmp_path / "model").touch()
    assert work_dir(QuickstartSettings(work_dir=str(tmp_path))) == tmp_path
    (tmp_path / "steps").rmdir()
    for folder in (tmp_path, tmp_path / "model"):
        with pytest.raises(KitError, match=f"WORK_DIR={folder} is not the quickstart's, and not empty: give a new"):
            work_dir(QuickstartSettings(work_dir=str(folder)))


def test_a_missing_checkpoint_is_not_complete(tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    assert not has_checkpoint(tmp_path)
    (tmp_path / "iter_0000007" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt").touch()
    assert has_checkpoint(tmp_path)
