"""The three that train the same model with the same options, each in a process of its own: `python -m ... NAME`.

Options of all: bfloat16 with float32 values to update, blocks compiled, fused AdamW, gradients clipped at norm 1, the
same initial weights and tokens. Prints one line of JSON: seconds of every step, losses, peak memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn as nn

from benchmarks.gpu.shapes import SHAPES, Shape
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.execute.weights import weigher
from shardwise.layout import Layout, Precision, Techniques

__all__ = ["CONTENDERS", "main"]

RATE, BETAS, DECAY, CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0


def main(arguments: Sequence[str] | None = None) -> None:
    """One contender, once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=tuple(CONTENDERS))
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("high")
    shape, device = SHAPES[options.shape], torch.device(options.device)
    made = CONTENDERS[options.name](shape, device, options.backend, options.steps)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    print(json.dumps({**made, "peak_bytes": peak}))


def _model(shape: Shape, device: torch.device) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with device:
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**shape.config))
    return model.train()


def _tokens(shape: Shape, step: int) -> torch.Tensor:
    """(batch, sequence), the same for every contender."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, shape.vocabulary, (shape.batch, shape.sequence), generator=generator)


def _timed(steps: int, device: torch.device, step: Callable[[int], float]) -> dict[str, Any]:
    seconds, losses = [], []
    for number in range(steps):
        _wait(device)
        start = time.perf_counter()
        losses.append(step(number))
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "losses": losses}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _adamw(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
    vectors = [parameter for parameter in parameters if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)


def _ours(shape: Shape, device: torch.device, backend: str, steps: int, *, compute: str = "bfloat16") -> dict[str, Any]:
    model = _model(shape, device)

    def parts(number: int) -> Any:
        tokens = _tokens(shape, number).to(device)
        whole = {"input_ids": tokens, "labels": tokens}
        return split(whole, micro_batches=1, replicas=1, weights=weigher(model))[0]

    program = assemble(
        model,
        parts(0)[0].inputs,
        layout=Layout(),
        rank=0,
        device=device,
        num_micro_batches=1,
        techniques=Techniques(precision=Precision(compute=compute), compile=backend),
    )
    optimizer = _adamw([state.parameter for state in program.states.values()])

    def step(number: int) -> float:
        result = program.step(parts(number), step=number)
        norm = program.gradient_norm()
        if norm > CLIP:
            program.scale_gradients(CLIP / norm)
        optimizer.step()
        program.updated()
        optimizer.zero_grad(set_to_none=True)
        return result.loss

    timed = _timed(steps, device, step)
    notes = () if program.compiled is None else program.compiled.notes()
    return {**timed, "notes": [*notes, program.numerics.precision.label]}


def _ours_float8(shape: Shape, device: torch.device, backend: str, steps: int) -> dict[str, Any]:
    return _ours(shape, device, backend, steps, compute="float8")


def _plain(shape: Shape, device: torch.device, backend: str, steps: int) -> dict[str, Any]:
    model: Any = _model(shape, device)
    for layer in model.model.layers:
        layer.compile(backend=backend)
    model.model.norm.compile(backend=backend)
    optimizer = _adamw(list(model.parameters()))

    def step(number: int) -> float:
        tokens = _tokens(shape, number).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return {**_timed(steps, device, step), "notes": ["autocast to bfloat16, parameters in float32"]}


def _trainer(shape: Shape, device: torch.device, backend: str, steps: int) -> dict[str, Any]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    seconds: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        start = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            _wait(device)
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            _wait(device)
            seconds.append(time.perf_counter() - self.start)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    rows = [row for number in range(steps) for row in _tokens(shape, number)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=shape.batch,
            bf16=True,
            use_cpu=device.type == "cpu",
            torch_compile=True,
            torch_compile_backend=backend,
            optim="adamw_torch_fused",
            learning_rate=RATE,
            lr_scheduler_type="constant",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            weight_decay=DECAY,
            max_grad_norm=CLIP,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=device.type == "cuda",
            train_sampling_strategy="sequential",
        )
        trainer = Trainer(model=_model(shape, device), args=arguments, train_dataset=data, callbacks=[Clock()])
        trainer.train()
    return {"seconds": seconds, "losses": losses, "notes": ["the whole model compiled, as Trainer does it"]}


CONTENDERS: Mapping[str, Callable[[Shape, torch.device, str, int], dict[str, Any]]] = MappingProxyType(
    {"ours": _ours, "plain": _plain, "trainer": _trainer, "ours_float8": _ours_float8}
)

if __name__ == "__main__":
    main()
