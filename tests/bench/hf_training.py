"""Trains a model folder's shape with Hugging Face alone, as a baseline: `python -m tests.bench.hf_training --help`.

Qwen2ForCausalLM with random weights, SDPA attention, torch.compile, fused AdamW, gradients clipped to 1. Everything is
in bfloat16, moments and gradients too, unless --master-weights: then weights are float32 under autocast. Rows are
random, or those of a dataset in the order of common.train.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.model.shape.config import load_config
from common.model.shape.lora import MODULES, LoraConfig
from common.training.loop.metrics import flops_per_token


def rows(arguments: argparse.Namespace, vocab_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (tokens, labels) [mbs, s]: labels are the tokens that follow."""
    if not arguments.data:
        while True:
            window = torch.randint(0, vocab_size, (arguments.micro_batch_size, arguments.seq_length + 1), device="cuda")
            yield window[:, :-1], window[:, 1:]
    from common.data.dataset.builder import build_dataset
    from common.data.dataset.data_loader import MicroBatchLoader
    from common.data.dataset.manifest import resolve

    samples = build_dataset(
        resolve(arguments.data), train_mode="pretrain", seq_length=arguments.seq_length, seed=arguments.seed
    )
    read = MicroBatchLoader(
        samples, start_sample=0, global_batch_size=arguments.global_batch_size, dp_rank=0, dp_size=1,
        micro_batch_size=arguments.micro_batch_size,
    ).read_from(0)  # fmt: skip
    for batch in read:
        yield batch["tokens"].cuda(), batch["labels"].cuda()


def build(arguments: argparse.Namespace) -> torch.nn.Module:
    if arguments.weights:
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=torch.float32, attn_implementation="sdpa"
        ).cuda()
    else:
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(arguments.model), attn_implementation="sdpa"
            )
    model = model.train() if arguments.master_weights else model.to(torch.bfloat16).train()
    if arguments.lora:
        import peft

        config = peft.LoraConfig(r=arguments.lora, lora_alpha=2 * arguments.lora, target_modules="all-linear")
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        model.enable_input_require_grads()
    if arguments.checkpointing:
        model.gradient_checkpointing_enable()
    return model


def learning_rate(arguments: argparse.Namespace, step: int) -> float:
    """Linear warm-up from 0 to the highest rate, then constant: as LR_DECAY_STYLE=constant of step 3."""
    return arguments.lr * min(1.0, (step - 1) / arguments.warmup) if arguments.warmup else arguments.lr


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--weights", action="store_true", help="the folder's weights, not random ones")
    parser.add_argument("--data", help="OUTPUT_PREFIX of step 1; without it rows are random")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--global-batch-size", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--warmup", type=int, default=0)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--master-weights", action="store_true")
    parser.add_argument("--checkpointing", action="store_true", help="each layer again in backward")
    parser.add_argument("--lora", type=int, default=0, help="rank of PEFT's adapters; 0: train all weights")
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    qwen = load_config(arguments.model)
    model = build(arguments)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=arguments.lr, weight_decay=arguments.weight_decay, betas=(0.9, 0.95), fused=True
    )
    forward = model if arguments.no_compile else torch.compile(model)
    data = rows(arguments, qwen.vocab_size)
    parts = arguments.global_batch_size // arguments.micro_batch_size

    def step(number: int) -> float:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(arguments, number)
        total = torch.zeros((), device="cuda")
        for _ in range(parts):
            tokens, labels = (tensor.contiguous() for tensor in next(data))
            with torch.autocast("cuda", torch.bfloat16, enabled=arguments.master_weights):
                loss = forward(input_ids=tokens, labels=labels, shift_labels=labels).loss / parts
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    seconds = []
    for number in range(1, arguments.iterations + 1):
        start = time.perf_counter()
        loss = step(number)
        seconds.append(time.perf_counter() - start)
        print(f"iteration {number} loss {loss:.6f} {1e3 * seconds[-1]:.1f} ms", flush=True)
    middle = sorted(seconds[len(seconds) // 2 :])[len(seconds) // 4]
    rate = arguments.global_batch_size * arguments.seq_length / middle
    lora = LoraConfig(arguments.lora, 2.0 * arguments.lora, MODULES) if arguments.lora else None
    print(json.dumps({
        "tokens_per_s": rate, "tflops": rate * flops_per_token(qwen, arguments.seq_length, lora) / 1e12,
        "allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
