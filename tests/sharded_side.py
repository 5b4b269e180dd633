"""A layout that divides the state of training beside one device in plain torch, step by step, on one rank.

In float64: what sums in another order leave is far below any fault, also behind steps of an optimizer that normalises.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from shardwise.execute.assemble import assemble
from shardwise.execute.batches import MicroBatch, split
from shardwise.execute.program import Program
from shardwise.execute.weights import weigher
from shardwise.layout import Communication, Layout, Techniques
from shardwise.parallel.tensor.slices import cut
from shardwise.verify.comparison import errors_of, relative

STEPS = 3
TOLERANCE = 1e-9
SAMPLES = 16


class Block(nn.Module):
    """Attention of two heads and a network, before each a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=name == "o") for name in "qkvo")
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        q, k, v = (each(y).unflatten(-1, (2, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.o(y)
        return x + self.down(F.gelu(self.up(self.second(x))))


class Decoder(nn.Module):
    """Blocks between a table and a head, a parameter in the code between units, one that is frozen, one unused."""

    def __init__(self, width: int = 16, blocks: int = 4, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(40, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.head = nn.Linear(width, 40, bias=False)
        if tied:
            self.head.weight = self.table.weight
        self.gain = nn.Parameter(torch.full((width,), 1.5))
        self.unused = nn.Parameter(torch.ones(5))
        self.blocks[1].up.weight.requires_grad_(False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x * self.gain)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def batch_of() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 40, (SAMPLES, 6), generator=torch.Generator().manual_seed(1))
    return {"ids": ids, "labels": ids.roll(1, 1)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """The largest relative errors over all steps."""

    loss: float = 0.0
    gradient: float = 0.0
    norm: float = 0.0
    weight: float = 0.0
    evaluation: float = 0.0

    @property
    def worst(self) -> float:
        found = dataclasses.astuple(self)
        return math.inf if any(math.isnan(error) for error in found) else max(found)


def compare(
    rank: int,
    layout: Layout | str,
    *,
    tied: bool = False,
    clip: float = 0.0,
    make: Callable[[], nn.Module] | None = None,
    change: Callable[[Program], None] | None = None,
    algorithm: str = "auto",
) -> Errors:
    """Train both ways with AdamW. Collective. `change` may break the program, for tests of the test. `algorithm`: with
    "ring" ranks do not share memory."""
    layout = Layout.parse(layout) if isinstance(layout, str) else layout
    torch.manual_seed(0)
    one = (Decoder(tied=tied) if make is None else make()).double()
    model, batch = copy.deepcopy(one), batch_of()
    micro_batches = layout.num_micro_batches(SAMPLES)
    parts = split(batch, micro_batches=micro_batches, replicas=layout.num_replicas, weights=weigher(model))
    program = assemble(
        model,
        parts[0][0].inputs,
        layout=layout,
        rank=rank,
        num_micro_batches=micro_batches,
        techniques=Techniques(communication=Communication(algorithm=algorithm)),
    )
    try:
        if change is not None:
            change(program)
        return _compared(program, one, parts, clip)
    finally:
        program.close()


def _compared(program: Program, one: nn.Module, parts: Sequence[Sequence[MicroBatch]], clip: float) -> Errors:
    mine, whole = parts[program.place.replica], _together([each for own in parts for each in own])
    named = dict(one.named_parameters())
    states = [state.parameter for state in program.states.values()]
    ours = torch.optim.AdamW(states, lr=1e-2) if states else None
    theirs = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2)
    found = Errors()
    for step in range(STEPS):
        before = {name: value.clone() for name, value in program.values()}
        whole_before = {name: p.detach().clone() for name, p in named.items()}
        loss = program.step(mine, step=step).loss
        wanted = one(**whole)["loss"]
        wanted.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in named.values() if p.grad is not None))
        own_norm = program.gradient_norm()
        gradients = {name: None if g is None else g.clone() for name, g in program.gradients()}
        wanted_gradients = {name: _part(program, name, named[name].grad) for name in gradients}
        wanted_gradients = {name: None if g is None else g.clone() for name, g in wanted_gradients.items()}
        if clip and norm > clip:
            program.scale_gradients(clip / own_norm)
            for parameter in named.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(clip / norm)
        if ours is not None:
            ours.step()
            ours.zero_grad()
        program.updated()
        theirs.step()
        theirs.zero_grad()
        updates = {name: value - before[name] for name, value in program.values()}
        wanted_updates = {name: _part(program, name, named[name].detach() - whole_before[name]) for name in updates}
        errors = errors_of(
            gradients,
            updates,
            wanted_gradients,
            {name: update for name, update in wanted_updates.items() if update is not None},
            by_sign=True,
            roundings={name: float(w.norm()) * torch.finfo(w.dtype).eps * (step + 1) for name, w in before.items()},
        )
        assert {n: g is None for n, g in gradients.items()} == {n: g is None for n, g in wanted_gradients.items()}
        found = Errors(
            loss=max(found.loss, relative(loss, float(wanted.detach()))),
            gradient=max(found.gradient, *(error.gradient for error in errors)),
            norm=max(found.norm, relative(own_norm, norm)),
            weight=max(found.weight, *(error.update for error in errors)),
        )
    program.model.eval()
    with torch.no_grad():
        evaluation = relative(program.evaluate(mine).loss, float(one.eval()(**whole)["loss"]))
    return dataclasses.replace(found, evaluation=evaluation)


def _together(parts: Sequence[MicroBatch]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([each.inputs[name] for each in parts]) for name in parts[0].inputs}


def _part(program: Program, name: str, whole: torch.Tensor | None) -> torch.Tensor | None:
    """What of a whole tensor belongs on this rank."""
    place = program.place
    for part, own in ((program.experts_of(name), place.expert), (program.part_of(name), place.shard)):
        whole = whole if part is None or whole is None else cut(whole, part, own)
    return whole
