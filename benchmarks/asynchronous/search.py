"""Held-out loss of the demo's data by workers, one behind the other in one process: a search for outer optimizers.

    python -m benchmarks.asynchronous.search --workers 4 --outer-rate 1.0 --momentum 0 [--begin 320 --steps 640]

Plain torch, without ranks, because workers compute exactly this (tests/train/test_asynchronous.py). The model is a
Llama of 2 layers, hidden 64, on the demo's tokens, batch and rates; with `--whole` it is the demo's own. The first
`--begin` steps are synchronous; their end is kept in `--folder` for other calls. `--workers 1` is synchronous all the
way, and has to be run first where `--begin` is above 0.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from benchmarks.asynchronous.setting import DEMO, SMALL
from shardwise.parallel.states import State
from shardwise.tasks import Task, prepare_task, sample_indices, task_from
from shardwise.trace.deferred import defer
from shardwise.trace.placing import place
from shardwise.train.asynchronous.outer_sgd import OuterSGD
from shardwise.train.model import model_factory
from shardwise.train.optimizer import optimizer_over, set_rate
from shardwise.train.rate import learning_rate
from shardwise.train.run_file import Run, load_run

__all__ = ["main"]

HELD_OUT_BATCHES, HELD_OUT_SIZE = 8, 16


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; prints one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.asynchronous.search", description=__doc__)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--every", type=int, default=32)
    parser.add_argument("--outer-rate", type=float, default=1.0)
    parser.add_argument("--momentum", type=float, default=0.0, help="Nesterov's")
    parser.add_argument("--rate", type=float, default=5e-3, help="peak of the inner rate, of workers")
    parser.add_argument("--beta2", type=float, default=0.95, help="of the inner AdamW")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--begin", type=int, default=0)
    parser.add_argument("--steps", type=int, default=320, help="in all")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/search"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    run = load_run(DEMO, [f"folder={options.folder}", *(() if options.whole else SMALL)])
    losses, held_out = _trained(run, task_from(run.task.kind, prepare_task(run.task.kind, run.task_options)), options)
    told = {name: str(value) for name, value in vars(options).items()}
    print(json.dumps({"options": told, "losses": losses, "held_out": held_out}))


def _trained(run: Run, task: Task, options: argparse.Namespace) -> tuple[list[float], list[tuple[int, float]]]:
    model = _model(run)
    parameters = list(model.parameters())
    optimizers = [_optimizer(run, parameters, options.beta2) for _ in range(options.workers)]
    start = [parameter.detach().clone() for parameter in parameters]
    velocity = [torch.zeros_like(value) for value in start]
    kept = options.folder / f"{options.whole}-{options.batch}-{options.steps}-{options.begin}.pt"
    first = 0
    if options.workers > 1 and options.begin:
        begun = torch.load(kept)
        start, first = begun["weights"], options.begin
        for optimizer in optimizers:
            optimizer.load_state_dict(copy.deepcopy(begun["optimizer"]))
            for group in optimizer.param_groups:
                group["betas"] = (run.training.betas[0], options.beta2)
    own = [[value.clone() for value in start] for _ in range(options.workers)]
    outer = OuterSGD(rate=options.outer_rate, momentum=options.momentum, nesterov=True)
    losses: list[float] = []
    held_out: list[tuple[int, float]] = []
    for step in range(first, options.steps):
        if options.workers == 1 and step == options.begin:
            torch.save({"weights": own[0], "optimizer": optimizers[0].state_dict()}, kept)
        losses.append(_step(run, task, options, step, model, parameters, own, optimizers))
        last = step + 1 == options.steps
        if options.workers == 1:
            start = own[0]
        elif (step + 1) % options.every == 0 or last:
            _meet(outer, start, velocity, own)
        if (step + 1) % 64 == 0 or last:
            _show(parameters, start)
            held_out.append((step + 1, _held_out(model, task)))
    return losses, held_out


def _step(
    run: Run,
    task: Task,
    options: argparse.Namespace,
    step: int,
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    own: Sequence[Sequence[torch.Tensor]],
    optimizers: Sequence[torch.optim.Optimizer],
) -> float:
    """One step of every worker; the mean of their losses."""
    training, count = run.training, options.workers
    indices = sample_indices(
        seed=training.seed, step=step, global_batch=options.batch, num_samples=task.num_samples("train")
    )
    rate = learning_rate(step, peak=options.rate, steps=options.steps, warm_up=training.warm_up)
    total = 0.0
    for k, optimizer in enumerate(optimizers):
        _show(parameters, own[k])
        rows = range(options.batch * k // count, options.batch * (k + 1) // count)
        batch = task.samples([indices[row] for row in rows], "train")
        loss = task.loss(model(**batch), batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.clip)
        set_rate(optimizer, rate)
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        total += loss.item()
    return total / count


@torch.no_grad()
def _meet(
    outer: OuterSGD, start: list[torch.Tensor], velocity: list[torch.Tensor], own: Sequence[Sequence[torch.Tensor]]
) -> None:
    for i, (begun, speed) in enumerate(zip(start, velocity, strict=True)):
        outer.step(begun, speed, begun - torch.stack([worker[i] for worker in own]).mean(0))
        for worker in own:
            worker[i].copy_(begun)


@torch.no_grad()
def _held_out(model: nn.Module, task: Task) -> float:
    model.eval()
    losses = []
    for number in range(min(HELD_OUT_BATCHES, task.num_samples("held_out") // HELD_OUT_SIZE)):
        batch = task.samples(range(number * HELD_OUT_SIZE, (number + 1) * HELD_OUT_SIZE), "held_out")
        losses.append(float(task.loss(model(**batch), batch)))
    model.train()
    return sum(losses) / len(losses)


def _show(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value


def _model(run: Run) -> nn.Module:
    blueprint = defer(model_factory(run.model), seed=run.training.seed)
    model = blueprint.module
    names = [name for name, _ in model.named_parameters()]
    names += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    values: Mapping[str, Any] = blueprint.materialize(names)
    place(model, values)
    return model.train()


def _optimizer(run: Run, parameters: Sequence[nn.Parameter], beta2: float) -> torch.optim.Optimizer:
    training, betas = run.training, (run.training.betas[0], beta2)
    states = {str(i): State(parameter=p, shape=tuple(p.shape)) for i, p in enumerate(parameters)}
    made = optimizer_over(states, betas=betas, epsilon=training.epsilon, weight_decay=training.weight_decay)
    assert made is not None
    return made


if __name__ == "__main__":
    main()
