"""Held-out loss of a small Llama with gradients on time and one step late, one process: what pipedream-2bw costs.

    python -m benchmarks.schedules.late_gradients [--steps 400] [--optimizer adamw] [--rates 1e-3 3e-3]

    W(t+1) = W(t) - update(gradient of step t at W(t-1)), W(-1) = W(0)

Plain torch, without shardwise, because a pipeline that is not drained computes exactly this
(tests/train/test_continuous.py). Bytes of Python's own standard library are the data.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn as nn
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["corpus", "main", "train"]

LENGTH, BATCH = 64, 8  # bytes of a sample, samples of a step
WARM_UP, FINAL, CLIP = 20, 0.1, 1.0
HELD_OUT_BATCHES, HELD_OUT_SEED = 8, 10_000
FILES = 120


def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to train on, and the last twentieth."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:FILES]
    data = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
    return data[: int(len(data) * 0.95)], data[int(len(data) * 0.95) :]


def train(
    data: tuple[torch.Tensor, torch.Tensor], *, optimizer: str, rate: float, steps: int, late: bool
) -> Mapping[int, float]:
    """Steps -> held-out loss, after 1/8, 1/4, 1/2, 3/4 and all of the steps."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=256,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config)
    parameters = list(model.parameters())
    updates = _optimizer(optimizer, parameters, rate)
    older = _copies(parameters)
    held_out: dict[int, float] = {}
    for step in range(steps):
        for group in updates.param_groups:
            group["lr"] = _rate(step, rate, steps)
        newest = _copies(parameters)
        if late:
            _put(parameters, older)
        batch = _batch(data[0], step)
        model(input_ids=batch, labels=batch).loss.backward()
        _put(parameters, newest)
        older = newest
        nn.utils.clip_grad_norm_(parameters, CLIP)
        updates.step()
        updates.zero_grad()
        if step + 1 in {steps * eighths // 8 for eighths in (1, 2, 4, 6, 8)}:
            held_out[step + 1] = _held_out(model, data[1])
    return held_out


def _optimizer(name: str, parameters: Sequence[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9 if name == "momentum" else 0.0)


def _rate(step: int, peak: float, steps: int) -> float:
    if step < WARM_UP:
        return peak * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, steps - 1 - WARM_UP)
    return peak * (FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * done)))


def _batch(data: torch.Tensor, seed: int) -> torch.Tensor:
    starts = torch.randint(0, len(data) - LENGTH, (BATCH,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([data[start : start + LENGTH] for start in starts.tolist()])  # (BATCH, LENGTH)


def _copies(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _put(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _held_out(model: LlamaForCausalLM, data: torch.Tensor) -> float:
    with torch.no_grad():
        batches = [_batch(data, HELD_OUT_SEED + number) for number in range(HELD_OUT_BATCHES)]
        return sum(float(model(input_ids=batch, labels=batch).loss) for batch in batches) / HELD_OUT_BATCHES


def main() -> None:
    """Train and print, a line a curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--optimizer", choices=["adamw", "sgd", "momentum"], default="adamw")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = corpus()
    for rate in options.rates:
        for late in (False, True):
            found = train(data, optimizer=options.optimizer, rate=rate, steps=options.steps, late=late)
            told = "  ".join(f"{step}: {loss:.3f}" for step, loss in found.items())
            print(f"{options.optimizer} {rate:g} {'one step late' if late else 'on time      '}  {told}", flush=True)


if __name__ == "__main__":
    main()
