"""Muon beside its definition and torch's, and on layouts that divide its matrices beside one device."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from models import make

from shardwise.launch import RankStarter
from shardwise.parallel.states import State
from shardwise.train.optimizer import optimizer_over, set_rate
from shardwise.train.optimizers.matrices import Matrices
from shardwise.train.optimizers.muon import Muon
from shardwise.train.optimizers.newton_schulz import as_matrices, orthogonalised
from shardwise.verify import verify

pytestmark = pytest.mark.slow  # `make verify-all`

SHAPES = {"wide": (8, 24), "tall": (24, 8), "square": (16, 16)}


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_singular_values_go_to_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = seeded(*shape)
    made = orthogonalised(matrix)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.diagonal(u.mT @ made @ v.mT)
    assert bool((values > 0.4).all())
    assert bool((values < 1.3).all())
    torch.testing.assert_close(u * values @ v, made)


def test_a_stack_is_each_of_its_matrices_and_a_convolution_one() -> None:
    stack = seeded(3, 6, 4)
    torch.testing.assert_close(orthogonalised(stack), torch.stack([orthogonalised(each) for each in stack]))
    assert as_matrices(seeded(8, 4, 3, 3)).shape == (8, 36)


def test_it_is_torchs_muon_but_for_its_precision() -> None:
    """torch multiplies in bfloat16."""
    ours, theirs = ({name: nn.Parameter(seeded(*shape).float()) for name, shape in SHAPES.items()} for _ in range(2))
    states = {name: State(parameter=p, shape=tuple(p.shape)) for name, p in ours.items()}
    muon = Muon(states, frozenset(states), matrices=Matrices(()), others=None, weight_decay=0.1)
    set_rate(muon, 0.05)
    reference = torch.optim.Muon(theirs.values(), lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = {name: parameter.detach().clone() for name, parameter in ours.items()}
    for step in range(3):
        for name, parameter in ours.items():
            parameter.grad = seeded(*parameter.shape, seed=step + 1).float()
            theirs[name].grad = parameter.grad.clone()
        muon.step()
        reference.step()
    for name, parameter in ours.items():
        moved = parameter.detach() - before[name]
        assert float((moved - (theirs[name].detach() - before[name])).norm() / moved.norm()) < 0.02


def test_the_rest_is_adamws_with_the_same_rate_and_one_state() -> None:
    states = {
        name: State(parameter=nn.Parameter(seeded(*shape).float()), shape=shape)
        for name, shape in {"w": (4, 6), "b": (6,), "table": (9, 4)}.items()
    }
    rest = {name: states[name] for name in ("b", "table")}
    muon = Muon(states, {"w"}, matrices=Matrices(()), others=optimizer_over(rest, weight_decay=0.1))
    set_rate(muon, 0.1)
    assert [group["lr"] for group in muon.param_groups] == [0.1] * 3
    for state in states.values():
        state.parameter.grad = torch.ones_like(state.parameter)
    muon.step()
    kept = {name: sorted(muon.state[state.parameter]) for name, state in states.items()}
    adamw = ["exp_avg", "exp_avg_sq", "step"]
    assert kept == {"w": ["momentum_buffer"], "b": adamw, "table": adamw}
    muon.zero_grad(set_to_none=True)
    assert all(state.parameter.grad is None for state in states.values())


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("gpt2", "tp=2,pp=2"),  # packed [q|k|v]
        ("gpt2", "fsdp=2,zero=2,tp=2"),
        ("llama", "fsdp=3,zero=3"),
        ("mixtral", "ep=2"),
    ],
)
def test_divided_matrices_are_updated_as_whole_ones(name: str, layout: str, starter: RankStarter) -> None:
    """In float64: singular values that are nothing but rounding grow 485-fold, and in float32 one would see them.
    (Losses and some norms compute in float32 all the same.)"""
    example = make(name)
    if name == "mixtral":
        example.model.set_experts_implementation("batched_mm")  # grouped products know no float64
    comparison = verify(
        example.model,
        example.batch,
        layout=layout,
        loss=example.loss,
        steps=3,
        optimizer="muon",
        dtype="float64",
        starter=starter,
    )
    assert comparison.gradient_error <= 1e-6, str(comparison)
    assert comparison.weight_error <= 1e-5, str(comparison)
