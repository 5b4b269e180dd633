"""One step of a small model on one device, as a layout of one rank runs it, and what it holds meanwhile."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers as hf
from models import Example, make
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.layout import Layout, Offload

WIDTH = 16


class Block(nn.Module):
    """Counts its runs; dropout, running statistics, and a checkpoint of its own where asked for."""

    def __init__(self, own: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm, self.dropout = nn.BatchNorm1d(4 * WIDTH), nn.Dropout(0.2)
        self.own, self.runs, self.products = own, 0, 0

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(torch.tanh(self.norm(self.a(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        h = checkpoint(self.inner, x, use_reentrant=False) if self.own else self.inner(x)
        return x + self.dropout(self.b(h))


class Blocks(nn.Module):
    def __init__(self, own: bool = False, *, around: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(own) for _ in range(3))
        self.around = around

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.around else block(x)
        return F.mse_loss(x, torch.ones_like(x))


BATCH = {"x": torch.linspace(-1, 1, 32 * WIDTH).view(32, WIDTH).sin()}


@dataclasses.dataclass
class Ran:
    loss: float
    gradients: Mapping[str, torch.Tensor | None]
    buffers: Mapping[str, torch.Tensor]
    runs: list[int]


def run(
    model: nn.Module,
    recompute: str,
    *,
    batch: Any = None,
    micro_batches: int = 2,
    loss: Any = None,
    offload: str = "none",
) -> Ran:
    """One step on one device."""
    batch = BATCH if batch is None else batch
    parts = split(batch, micro_batches=micro_batches, replicas=1, weights=lambda part: 1.0)[0]
    layout = Layout(recompute=recompute, micro_batches=micro_batches, offload=Offload(offload))
    program = assemble(model, parts[0].inputs, layout=layout, rank=0, loss=loss)
    for module in model.modules():
        if isinstance(module, Block):
            module.runs = 0  # a trace runs it too
    result = program.step(parts, step=3)
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    program.close()
    runs = [module.runs for module in model.modules() if isinstance(module, Block)]
    return Ran(result.loss, gradients, dict(model.named_buffers()), runs)


@functools.cache
def plain(name: str) -> Ran:
    """Of the model of that name, which keeps everything where it is."""
    example = make(name)
    return run(example.model, "none", batch=example.batch, loss=example.loss)


def assert_same(ran: Ran, plain: Ran) -> None:
    assert ran.loss == plain.loss
    for name, gradient in plain.gradients.items():
        own = ran.gradients[name]
        assert (own is None) == (gradient is None), name
        assert own is None or gradient is None or torch.equal(own, gradient), name
    for name, buffer in plain.buffers.items():
        assert torch.equal(ran.buffers[name], buffer), name


class Alive(TorchDispatchMode):  # type: ignore[misc]
    """Bytes of what was made inside and is still there."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, list | tuple) else (out,):
            if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and leaf.device.type != "meta":
                storage = leaf.untyped_storage()
                if storage._cdata not in self._made or self._made[storage._cdata][0].expired():
                    self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    @property
    def nbytes(self) -> int:
        return sum(nbytes for storage, nbytes in self._made.values() if not storage.expired())


def llama() -> Example:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=64, use_cache=False, **sizes))
    ids = torch.randint(0, 64, (4, 32))
    return Example(model=model, batch={"input_ids": ids, "labels": ids})


def kept_bytes(recompute: str, offload: str = "none") -> int:
    """What a llama keeps between forward and backward, measured."""
    example = llama()
    told: list[int] = []
    watched: list[Alive] = []

    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        value: torch.Tensor = outputs.loss
        if watched:  # no trace
            value.register_hook(lambda gradient: told.append(watched[0].nbytes))  # type: ignore[no-untyped-call]
        return value

    parts = split(example.batch, micro_batches=1, replicas=1, weights=lambda part: 1.0)[0]
    program = assemble(
        example.model, parts[0].inputs, layout=Layout(recompute=recompute, offload=Offload(offload)), rank=0, loss=loss
    )
    program.step(parts, step=0)  # whatever is made once
    with Alive() as alive:
        watched.append(alive)
        program.step(parts, step=1)
    program.close()
    assert len(told) == 1
    return told[0]
