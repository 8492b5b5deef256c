"""Training in real gloo processes: every layout gives the same, and a stopped run the same as an uninterrupted one."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

from common.data.dataset.builder import build_dataset
from common.data.dataset.manifest import resolve
from common.ports import free_port
from tests.conversion import to_hf, to_megatron
from tests.distributed.launch import forked, run, steps, train, train_forked, words
from tests.tiny import tiny_qwen

COMMON = {
    "seq_length": 32, "micro_batch_size": 2, "global_batch_size": 8, "precision": "fp32", "log_interval": 1,
    "lr": 1e-3, "min_lr": 1e-4, "split": "100,0,0",
}  # fmt: skip


def settings(work: Path, mode: str, **more: Any) -> dict[str, Any]:
    data = work / ("sft" if mode == "finetune" else "pretrain")
    # One sample a row, as Hugging Face gets them; test_packing.py compares rows of several.
    length = {"seq_length": 96, "packing": False} if mode == "finetune" else {}
    return {
        **COMMON,
        "train_mode": mode,
        "dataset_path": data,
        "load_checkpoint_path": work / "start",
        **length,
        **more,
    }


def weights(work: Path, checkpoint: Path) -> dict[str, torch.Tensor]:
    target = work / f"exported_{checkpoint.name}_{time.monotonic_ns()}"
    return load_file(to_hf(checkpoint, target) / "model.safetensors")


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2, "gpus": 2, "sequence_parallel": False},
    "tp2_sequence_parallel": {"tp": 2, "gpus": 2},
    "pp2": {"pp": 2, "gpus": 2},
    "dp2": {"gpus": 2},
    "tp2_pp2": {"tp": 2, "pp": 2, "gpus": 4},
    "pp2_vpp2": {"pp": 2, "vpp": 2, "gpus": 2},
}


@pytest.fixture(scope="module")
def one_process(work: Path) -> list[tuple[int, float, float]]:
    log = train_forked(**settings(work, "finetune", save_checkpoint_path=work / "one", train_iters=20))
    found = steps(log)
    assert [i for i, _, _ in found] == list(range(1, 21))
    return found


def assert_same_curve(found: list[tuple[int, float, float]], expected: list[tuple[int, float, float]]) -> None:
    """Losses and gradient norms as of `steps`, within what float32 sums in another order differ by."""
    for (i, loss, norm), (_, expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert abs(loss - expected_loss) <= 1e-4, i
        assert abs(norm - expected_norm) <= 1e-3 * expected_norm, i


LANE = "pp2_vpp2"  # in every lane: Megatron-Core's versions differ in how a stage knows its chunk


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.lane] * (name == LANE)) for name in LAYOUTS])
def test_every_layout_follows_one_process(work: Path, one_process: list[tuple[int, float, float]], name: str) -> None:
    log = train_forked(**settings(work, "finetune", save_checkpoint_path=work / name, train_iters=20, **LAYOUTS[name]))
    found = steps(log)
    assert len(found) == 20
    assert_same_curve(found, one_process)


def test_virtual_stages_over_four_ranks_follow_one_process(work: Path) -> None:
    to_megatron(tiny_qwen(work / "deep", std=0.05, spread=0.05, num_hidden_layers=8), work / "deep_start")
    flags = {**settings(work, "pretrain"), "load_checkpoint_path": work / "deep_start", "train_iters": 6}
    one = steps(train_forked(**flags, save_checkpoint_path=work / "deep_one"))
    to_megatron(work / "deep", work / "deep_stages", pp=4, vpp=2, transformer_impl="local")
    flags["load_checkpoint_path"] = work / "deep_stages"
    four = steps(train_forked(**flags, save_checkpoint_path=work / "deep_four", gpus=4, pp=4, vpp=2))
    assert len(one) == len(four) == 6
    assert_same_curve(four, one)


def test_the_first_loss_is_hugging_faces_over_the_supervised_tokens(
    work: Path, one_process: list[tuple[int, float, float]]
) -> None:
    data = resolve(str(work / "sft"))
    samples = build_dataset(data, train_mode="finetune", seq_length=96, seed=1234, documents=range(200))
    rows = [samples[i] for i in range(8)]
    names = ("tokens", "labels", "loss_mask")
    tokens, labels, mask = (torch.stack([torch.from_numpy(row[name]) for row in rows]) for name in names)
    with torch.no_grad():
        logits = Qwen2ForCausalLM.from_pretrained(work / "qwen").float()(tokens).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    expected = float((losses * mask.flatten()).sum() / mask.sum())
    assert abs(one_process[0][1] - expected) <= 2e-6


def test_weights_weigh_the_loss_and_its_gradient(work: Path) -> None:
    turns = [("assistant", f"{i}{i}", weight) for i, weight in enumerate((0.3, 1.0, 2.5, 0.7))]
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": role, "content": text * (n + 1), "loss": weight}]}
        for n, (role, text, weight) in enumerate(turns * 2)
    ]
    (work / "weighted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"input": work / "weighted.jsonl", "output_prefix": work / "weighted", "tokenizer_path": work / "qwen"}
    run("-m", "common.preprocess", "sft", *words({**flags, "workers": 1}))
    flags = settings(work, "finetune", save_checkpoint_path=work / "by_weight", train_iters=1)
    ((_, loss, norm),) = steps(train_forked(**{**flags, "dataset_path": work / "weighted"}, gpus=2))

    data = resolve(str(work / "weighted"))
    samples = build_dataset(data, train_mode="finetune", seq_length=96, seed=1234, documents=range(8))
    batch = [samples[i] for i in range(8)]
    tokens, labels, mask = (
        torch.stack([torch.from_numpy(row[name]) for row in batch]) for name in ("tokens", "labels", "loss_mask")
    )
    assert {0.3, 0.7, 1.0, 2.5} == {round(weight, 4) for weight in mask.unique().tolist()} - {0.0}
    model = Qwen2ForCausalLM.from_pretrained(work / "qwen").float()
    losses = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), reduction="none")
    expected = (losses * mask.flatten()).sum() / mask.sum()
    expected.backward()
    theirs = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert abs(loss - expected.item()) <= 1e-5
    assert abs(norm - theirs.item()) <= 1e-3 * theirs.item()


@pytest.mark.lane
@pytest.mark.parametrize(
    ("ckpt_format", "layout"),
    [("torch_dist", {"gpus": 2, "precision": "bf16"}), ("torch", {"tp": 2, "pp": 2, "gpus": 4})],
    ids=str,
)
def test_ten_and_ten_steps_are_twenty(work: Path, ckpt_format: str, layout: dict[str, Any]) -> None:
    name = f"resumed_{ckpt_format}"
    if ckpt_format == "torch":
        to_megatron(work / "qwen", work / "start_ranks", tp=2, pp=2, transformer_impl="local")
        layout = {**layout, "load_checkpoint_path": work / "start_ranks"}
    same = {**settings(work, "pretrain"), "train_iters": 20, "ckpt_format": ckpt_format, **layout}
    uninterrupted = steps(train_forked(**same, save_checkpoint_path=work / f"{name}_uninterrupted"))
    halves = [steps(train_forked(**same, save_checkpoint_path=work / name, exit_interval=10)) for _ in range(2)]
    assert [i for i, _, _ in halves[0]] == list(range(1, 11)) and [i for i, _, _ in halves[1]] == list(range(11, 21))
    assert halves[0] + halves[1] == uninterrupted
    expected, found = (weights(work, work / folder) for folder in (f"{name}_uninterrupted", name))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[tensor], found[tensor]) for tensor in expected)


def test_a_learning_rate_of_zero_changes_no_bit_and_both_ways_out_agree(work: Path) -> None:
    still = {"lr": 0, "min_lr": 0, "train_iters": 3, "tp": 2, "pp": 2, "gpus": 4}
    source = load_file(work / "qwen" / "model.safetensors")
    train_forked(**{**settings(work, "pretrain", save_checkpoint_path=work / "still"), **still})
    assert all(torch.equal(source[name], tensor) for name, tensor in weights(work, work / "still").items())
    log = train_forked(
        train_or_convert_ckpt="convert", load_checkpoint_path=work / "still", save_checkpoint_path=work / "still_torch",
        tp=2, pp=2, gpus=4, **COMMON,
    )  # fmt: skip
    ranks = sorted(path.name for path in (work / "still_torch" / "iter_0000003").iterdir())
    assert ranks == ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"], log
    assert all((work / "still_torch" / "iter_0000003" / rank / "distrib_optim.pt").is_file() for rank in ranks)
    direct, around = (weights(work, work / name) for name in ("still", "still_torch"))
    assert direct.keys() == around.keys() == source.keys()
    assert all(torch.equal(direct[name], around[name]) for name in source)


@pytest.mark.lane
def test_a_distributed_checkpoint_resumes_at_another_layout(
    work: Path, one_process: list[tuple[int, float, float]]
) -> None:
    flags = settings(work, "finetune", save_checkpoint_path=work / "moved", train_iters=20)
    train_forked(**flags, tp=2, gpus=2, exit_interval=10)
    layout = {"pp": 2, "gpus": 2}
    rest = steps(train_forked(**flags, **layout, exit_interval=15))
    assert [i for i, _, _ in rest] == list(range(11, 16))
    assert_same_curve(rest, one_process[10:15])


@pytest.mark.lane
@pytest.mark.parametrize(
    ("ckpt_format", "layout"),
    [
        ("torch_dist", {"gpus": 2, "precision": "bf16", "async_save": True}),
        ("torch", {"precision": "bf16"}),
        ("torch_dist", {}),
    ],
    ids=str,
)
def test_state_on_the_host_changes_no_bit_and_is_saved_like_any_other(
    work: Path, ckpt_format: str, layout: dict[str, Any]
) -> None:
    name = f"host_{ckpt_format}_{len(layout)}"
    same = {**settings(work, "pretrain"), "train_iters": 12, "ckpt_format": ckpt_format, **layout}
    plain = steps(train_forked(**same, save_checkpoint_path=work / f"{name}_plain"))
    found = []
    for kind in ("cpu", "fp32", "cpu"):
        flags = {**same, "save_checkpoint_path": work / name, "exit_interval": 4, "optimizer_state": kind}
        found += steps(train_forked(**flags))
    assert found == plain and len(plain) == 12
    ours, theirs = (weights(work, work / folder) for folder in (name, f"{name}_plain"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.lane
@pytest.mark.parametrize(
    ("ckpt_format", "more"),
    [("torch_dist", {"gpus": 2, "async_save": True}), ("torch", {})],
    ids=["torch_dist", "torch"],
)
def test_half_of_the_state_on_the_host_trains_as_well_and_resumes_to_the_bit(
    work: Path, ckpt_format: str, more: dict[str, Any]
) -> None:
    name = f"half_{ckpt_format}"
    same = {**settings(work, "pretrain"), "train_iters": 12, "ckpt_format": ckpt_format, "precision": "bf16", **more}
    full = steps(train_forked(**same, save_checkpoint_path=work / f"{name}_fp32"))
    half = {**same, "optimizer_state": "cpu_bf16"}
    log = train_forked(**half, save_checkpoint_path=work / f"{name}_whole")
    assert log.count("host memory for the optimizer: 0.0 GiB in ") == 1 and "its state in host memory" in log
    whole = steps(log)
    assert len(whole) == 12 and whole != full
    assert whole[0] == full[0] and all(abs(a[1] - b[1]) <= 2e-3 for a, b in zip(whole, full, strict=True))
    halves = [steps(train_forked(**half, save_checkpoint_path=work / name, exit_interval=6)) for _ in range(2)]
    assert [i for i, _, _ in halves[1]] == list(range(7, 13)) and halves[0] + halves[1] == whole
    ours, theirs = (weights(work, work / folder) for folder in (name, f"{name}_whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    changed = []
    for kind in ("fp32", "cpu_bf16", "cpu", "cpu_bf16"):
        flags = {**same, "save_checkpoint_path": work / f"{name}_changed", "exit_interval": 3, "optimizer_state": kind}
        changed += steps(train_forked(**flags))
    assert [i for i, _, _ in changed] == list(range(1, 13)) and changed[:3] == full[:3] and changed != whole
    assert all(abs(a[1] - b[1]) <= 2e-3 for a, b in zip(changed, full, strict=True))


@pytest.mark.lane
def test_bf16_recompute_evaluation_and_asynchronous_saving_work_together(work: Path) -> None:
    flags = settings(work, "pretrain", train_iters=4, tp=2, gpus=2, precision="bf16")
    flags |= {"split": "80,20,0", "eval_interval": 2, "eval_iters": 2}
    plain = train_forked(**flags, save_checkpoint_path=work / "plain")
    full = train_forked(**flags, save_checkpoint_path=work / "full", recompute="full", async_save=True, save_interval=2)
    selective = train_forked(**flags, save_checkpoint_path=work / "selective", recompute="selective")
    assert steps(plain) == steps(full) == steps(selective)
    assert full.count("validation at iteration") == 2
    expected, found = (weights(work, work / name) for name in ("plain", "full"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_fields_of_megatron_core_are_set_by_name(work: Path) -> None:
    options = settings(work, "pretrain", train_iters=2, gpus=2, recompute="selective")
    plain = train_forked(**options, save_checkpoint_path=work / "mcore_plain")
    flags = words({**options, "master_port": free_port()})
    given = ["--mcore.transformer.recompute_modules", "core_attn", "mlp", "--mcore.ddp.bucket_size", "1000"]
    log = run("-m", "common.train", *given, *flags, f"--save-checkpoint-path={work / 'mcore'}")
    assert "megatron-core's transformer config: recompute_modules = ['core_attn', 'mlp']" in log
    assert "megatron-core's ddp config: bucket_size = 1000" in log and "megatron-core's" not in plain
    assert len(steps(log)) == 2
    assert_same_curve(steps(log), steps(plain))  # buckets of another size sum the norm in another order
    wrong = run("-m", "common.train", "--mcore.ddp.bucket_sise", "1", *flags, "--save-checkpoint-path=x", expect=2)
    assert "has no such field; did you mean bucket_size" in wrong


def test_a_torch_checkpoint_of_other_sizes_is_refused_before_any_process_starts(work: Path) -> None:
    start = to_megatron(work / "qwen", work / "other_sizes", tp=2, pp=1, transformer_impl="local")
    flags = settings(work, "pretrain", save_checkpoint_path=work / "refused", train_iters=1)
    log = train(**{**flags, "load_checkpoint_path": start}, expect=2)
    assert "TP=2 PP=1 VPP=1" in log and "TP=1 PP=1 VPP=1" in log and "step 2" in log
    assert not (work / "refused").exists()


def test_more_epochs_on_resume_change_no_earlier_step(work: Path) -> None:
    flags = {
        **settings(work, "finetune"),
        "global_batch_size": 100,
        "micro_batch_size": 50,
        "lr_decay_style": "constant",
    }
    first = steps(train_forked(**flags, save_checkpoint_path=work / "epochs", epochs=1))
    rest = steps(train_forked(**flags, save_checkpoint_path=work / "epochs", epochs=2))
    uninterrupted = steps(train_forked(**flags, save_checkpoint_path=work / "epochs_whole", epochs=2))
    assert [len(first), len(rest), len(uninterrupted)] == [2, 2, 4]
    assert first + rest == uninterrupted


def test_a_rank_that_runs_out_of_memory_reports_it_and_ends_while_the_others_wait_for_it(work: Path) -> None:
    flags = settings(work, "pretrain", save_checkpoint_path=work / "too_much", train_iters=4, gpus=2, recompute="full")
    log = forked(2, "tests.distributed.failing_worker", words({**flags, "master_port": free_port()}), expect=2)
    assert steps(log) and steps(log)[0][0] == 1 and len(steps(log)) < 4, log
    (error,) = (line for line in log.splitlines() if line.startswith("error: "))
    assert error.startswith("error: rank 1 is out of memory (") and "can't allocate memory" in error
    assert error.endswith(
        "): to use less memory: a MICRO_BATCH_SIZE below 2, a SEQ_LENGTH below 32, more GPUs, with TP over 1 or PP"
        " over 1"
    )
