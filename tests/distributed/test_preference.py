"""Preference training against the papers' formulas on Hugging Face's model: losses, rewards and all gradients."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

from tests.conversion import to_hf, to_megatron
from tests.distributed.launch import run, words, worker
from tests.preferences import log_probs, write_pairs
from tests.tiny import tiny_qwen

NUM_PAIRS = 12
BOUND = 1e-5  # relative to the largest value, in float32: other shapes are summed in another order
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"dpo_loss": "sigmoid", "dpo_beta": 0.3},
    "cautious": {"dpo_loss": "sigmoid", "dpo_beta": 0.3, "dpo_label_smoothing": 0.2, "dpo_sft_weight": 0.7},
    "ipo": {"dpo_loss": "ipo", "dpo_beta": 0.3},
    "orpo": {"dpo_loss": "orpo", "dpo_beta": 0.3},
}
Formula = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, a model, tied and untied, and another one as the reference."""
    folder = tmp_path_factory.mktemp("preference")
    tiny_qwen(folder / "tied", std=0.1, spread=0.1)
    tiny_qwen(folder / "untied", std=0.1, spread=0.1, tie_word_embeddings=False)
    for name, tied in (("tied", True), ("untied", False)):
        tiny_qwen(folder / f"reference_{name}", std=0.1, spread=0.1, seed=1, tie_word_embeddings=tied)
    run("-m", "common.preprocess", "sft", *words({
        "input": write_pairs(folder / "pairs.jsonl", NUM_PAIRS), "output_prefix": folder / "pairs",
        "tokenizer_path": folder / "tied", "workers": 1,
    }))  # fmt: skip
    for name in ("tied", "untied", "reference_tied", "reference_untied"):
        to_megatron(folder / name, folder / f"{name}_start", ckpt_format="torch_dist")
    return folder


def computed(work: Path, model: str, name: str, *, joined: bool = False, **more: Any) -> dict[str, dict[str, Any]]:
    """The means and the gradients, in Hugging Face's names, of a step over all pairs by each of LOSSES."""
    packed = {"packing": True, "seq_length": 320, "micro_batch_size": 1}
    apart = {"packing": False, "seq_length": 128, "micro_batch_size": 2}
    settings = {
        "train_mode": "dpo", "dataset_path": str(work / "pairs"), "split": "100,0", "precision": "fp32",
        "load_checkpoint_path": str(work / f"reference_{model}_start"), "save_checkpoint_path": str(work / "run"),
        "train_iters": 1, "num_workers": 0, **(packed if more.get("packing") else apart), **more,
    }  # fmt: skip
    settings["gpus"] = settings.get("tp", 1) * settings.get("pp", 1)
    runs = [{"settings": loss, "out": str(work / f"{name}_{key}")} for key, loss in LOSSES.items()]
    task = {"settings": settings, "weights": str(work / f"{model}_start"), "runs": runs, "joined": joined}
    worker(settings["gpus"], task, "preference_worker")
    found = {}
    for key, each in zip(LOSSES, runs, strict=True):
        out = Path(each["out"])
        found[key] = json.loads((out / "means.json").read_text())
        found[key]["gradients"] = load_file(to_hf(out, work / f"{out.name}_hf") / "model.safetensors")
    return found


def sigmoid(pi: torch.Tensor, ref: torch.Tensor, number: torch.Tensor, beta: float = 0.3) -> torch.Tensor:
    """Equation 7 of arXiv 2305.18290, of each pair."""
    return -torch.log(torch.sigmoid(beta * (pi[:, 0] - ref[:, 0]) - beta * (pi[:, 1] - ref[:, 1])))


def cautious(pi: torch.Tensor, ref: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Conservative DPO, and the loss per token of the chosen answers."""
    flipped = sigmoid(pi.flip(1), ref.flip(1), number)
    return 0.8 * sigmoid(pi, ref, number) + 0.2 * flipped + 0.7 * -(pi / number)[:, 0]


def ipo(pi: torch.Tensor, ref: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Equation 17 of arXiv 2310.12036, with means over tokens."""
    h = (pi / number - ref / number)[:, 0] - (pi / number - ref / number)[:, 1]
    return (h - 1 / (2 * 0.3)) ** 2


def orpo(pi: torch.Tensor, ref: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Equation 6 of arXiv 2403.07691."""
    p = (pi / number).exp()
    odds = p / (1 - p)
    return -torch.log(p[:, 0]) - 0.3 * torch.log(torch.sigmoid(torch.log(odds[:, 0] / odds[:, 1])))


FORMULAS: dict[str, Formula] = {"dpo": sigmoid, "cautious": cautious, "ipo": ipo, "orpo": orpo}
MUTANTS: dict[str, Formula] = {
    "another beta": lambda pi, ref, number: sigmoid(pi, ref, number, beta=0.31),
    "swapped answers": lambda pi, ref, number: sigmoid(pi.flip(1), ref.flip(1), number),
    "no reference": lambda pi, ref, number: sigmoid(pi, 0 * ref, number),
    "swapped reference": lambda pi, ref, number: sigmoid(pi, ref.flip(1), number),
    "means over tokens": lambda pi, ref, number: sigmoid(pi / number, ref / number, number),
}


@pytest.fixture(scope="module")
def hugging_face(work: Path) -> Callable[[str, Formula], tuple[float, dict[str, torch.Tensor]]]:
    """The mean loss of all pairs by a formula, and its gradients, from Hugging Face's models."""
    models = {name: Qwen2ForCausalLM.from_pretrained(work / name).float() for name in ("tied", "untied")}
    answers = {name: log_probs(model, work / "pairs") for name, model in models.items()}
    references = {}
    for name in models:
        with torch.no_grad():
            reference = Qwen2ForCausalLM.from_pretrained(work / f"reference_{name}").float()
            references[name] = log_probs(reference, work / "pairs")[0]

    def of(name: str, formula: Formula) -> tuple[float, dict[str, torch.Tensor]]:
        model, (pi, number) = models[name], answers[name]
        loss = formula(pi, references[name], number).mean()
        model.zero_grad()
        loss.backward(retain_graph=True)
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    return of


def difference(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference of all gradients, relative to the largest value of its tensor."""
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs)


LAYOUTS = [
    pytest.param(
        "tied", {"tp": tp, "pp": pp, "packing": packing}, id=f"tp{tp}_pp{pp}{'_packed' * packing}",
        marks=[pytest.mark.lane] * (tp == pp == 2),
    )
    for tp, pp in ((1, 1), (2, 1), (1, 2), (2, 2))
    for packing in (False, True)
] + [
    pytest.param("untied", {"tp": 2, "pp": 1, "packing": True, "sequence_parallel": False}, id="no_sequence_parallel"),
    pytest.param("untied", {"pp": 2, "vpp": 2}, id="pp2_vpp2", marks=pytest.mark.lane),
    pytest.param("untied", {"tp": 2, "pp": 2, "packing": True, "micro_batch_size": 2, "joined": True}, id="joined"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "layout"), LAYOUTS)
def test_losses_and_gradients_are_the_formulas_on_hugging_faces_model(
    work: Path, hugging_face: Any, request: pytest.FixtureRequest, model: str, layout: dict[str, Any]
) -> None:
    found = computed(work, model, request.node.callspec.id, **layout)
    for key, formula in FORMULAS.items():
        loss, gradients = hugging_face(model, formula)
        assert abs(found[key]["loss"] - loss) <= BOUND * max(1.0, loss), key
        assert difference(found[key]["gradients"], gradients) <= BOUND, key


def test_metrics_are_means_over_pairs(work: Path, hugging_face: Any) -> None:
    found = computed(work, "untied", "metrics", tp=2, packing=True)
    with torch.no_grad():
        models = [Qwen2ForCausalLM.from_pretrained(work / name).float() for name in ("untied", "reference_untied")]
        (pi, number), (ref, _) = (log_probs(model, work / "pairs") for model in models)
    for key, rewards, shown in (
        ("dpo", 0.3 * (pi - ref), pi), ("ipo", 0.3 * (pi - ref) / number, pi / number),
        ("orpo", 0.3 * pi / number, pi / number),
    ):  # fmt: skip
        expected = {
            "reward_chosen": rewards[:, 0], "reward_rejected": rewards[:, 1],
            "reward_margin": rewards[:, 0] - rewards[:, 1],
            "accuracy": (rewards[:, 0] > rewards[:, 1]).float(), "log_prob_chosen": shown[:, 0],
            "log_prob_rejected": shown[:, 1],
        }  # fmt: skip
        for name, values in expected.items():
            assert abs(found[key][name] - float(values.mean())) <= BOUND * max(1.0, float(values.abs().max())), (
                key,
                name,
            )
        assert found[key]["tokens"] == number.sum()
        assert 0 < found[key]["accuracy"] < 1


def test_mutants_of_the_formula_are_far_outside_the_bound(work: Path, hugging_face: Any) -> None:
    found = computed(work, "untied", "mutants")["dpo"]
    for name, mutant in MUTANTS.items():
        loss, gradients = hugging_face("untied", mutant)
        assert abs(found["loss"] - loss) > 100 * BOUND, name
        assert difference(found["gradients"], gradients) > 1000 * BOUND, name
