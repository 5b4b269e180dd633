"""Compiled units compute what they computed before; what cannot be compiled runs as it is, and is told by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm  # type: ignore[import-untyped]

from shardwise.errors import ConfigError
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.execute.compiled import Compiled
from shardwise.execute.program import Program
from shardwise.launch import RankContext
from shardwise.layout import Layout, Precision, Techniques
from shardwise.testing import on_ranks


@pytest.fixture(autouse=True)
def _no_monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling shows progress bars, which are watched by a thread otherwise."""
    monkeypatch.setattr(tqdm, "monitor_interval", 0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(torch.relu(self.up(x)))
        return out


class Random(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), 0.1, self.training)


class Model(nn.Module):
    def __init__(self, *blocks: type[Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for block in blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def step_of(
    layout: str, techniques: Techniques, *blocks: type[Block], rank: int = 0
) -> tuple[Program, float, dict[str, torch.Tensor | None]]:
    """A program behind one step, its loss and this rank's gradients."""
    torch.manual_seed(0)
    model = Model(*(blocks or (Block, Block)))
    laid_out = Layout.parse(layout)
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1))
    parts = split({"x": x}, micro_batches=2, replicas=laid_out.num_replicas, weights=lambda inputs: 1.0)
    program = assemble(
        model, parts[0][0].inputs, layout=laid_out, rank=rank, num_micro_batches=2, techniques=techniques
    )
    result = program.step(parts[program.place.replica], step=0)
    gradients = {name: None if g is None else g.clone() for name, g in program.gradients()}
    program.close()
    return program, result.loss, gradients


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(torch.allclose(a[name], b[name], rtol=1e-5, atol=1e-7) for name in b)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_unit_is_the_unit(backend: str) -> None:
    _, loss, gradients = step_of("dp=1", Techniques())
    program, compiled_loss, compiled_gradients = step_of("dp=1", Techniques(compile=backend))
    assert compiled_loss == pytest.approx(loss, rel=1e-6)
    assert same(compiled_gradients, gradients)
    assert program.compiled is not None
    assert program.compiled.notes() == (f"2 of 2 units compiled by {backend}",)


def test_in_16_bits_too() -> None:
    techniques = Techniques(precision=Precision(compute="bfloat16"))
    _, loss, gradients = step_of("dp=1", techniques)
    _, compiled_loss, compiled_gradients = step_of("dp=1", Techniques(precision=techniques.precision, compile="eager"))
    assert compiled_loss == loss
    assert same(compiled_gradients, gradients)


@on_ranks(2, timeout_s=120.0)
@pytest.mark.parametrize("layout", ["pp=2", "tp=2", "fsdp=2"])
def test_in_a_layout_too(rank: RankContext, layout: str) -> None:
    _, loss, gradients = step_of(layout, Techniques(), rank=rank.rank)
    program, compiled_loss, compiled_gradients = step_of(layout, Techniques(compile="eager"), rank=rank.rank)
    assert compiled_loss == pytest.approx(loss, rel=1e-6)
    assert same(compiled_gradients, gradients)
    assert program.compiled is not None
    assert all("not compiled" not in note for note in program.compiled.notes())


def test_a_unit_that_draws_runs_as_it_is_and_is_named() -> None:
    program, loss, _ = step_of("dp=1", Techniques(compile="eager"), Block, Random)
    assert loss == step_of("dp=1", Techniques(), Block, Random)[1]
    assert program.compiled is not None
    first, second = program.compiled.notes()
    assert first == "1 of 2 units compiled by eager"
    assert second == "not compiled: layers.1: it draws random numbers, which are keyed by sample"


def test_a_unit_whose_compilation_fails_runs_as_it_is_and_is_named() -> None:
    def fails(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such instruction")

    compiled = Compiled("eager")
    compiled.backend = fails  # type: ignore[assignment]
    body = compiled("layers.0", Block().forward)
    assert body(torch.ones(2, 8)).shape == (2, 8)
    assert "not compiled: layers.0" in compiled.notes()[1]
    assert "no such instruction" in compiled.notes()[1]


def test_emulated_products_are_not_compiled() -> None:
    precision = Precision(compute="bfloat16", emulate=True)
    program, loss, _ = step_of("dp=1", Techniques(precision=precision, compile="eager"))
    assert loss == step_of("dp=1", Techniques(precision=precision))[1]
    assert program.compiled is not None
    assert "a dispatch mode watches its operations" in program.compiled.notes()[1]


def test_a_backend_that_torch_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="no backend of torch.compile"):
        Compiled("fastest")
