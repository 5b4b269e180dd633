"""Whatever moves the bytes, a layout is one device; what compresses them trains as well, alike on all ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.launch import RankContext, RankStarter
from shardwise.layout import Communication, Layout, Techniques
from shardwise.testing import on_ranks
from shardwise.verify import verify

WIDTH, SAMPLES = 48, 8


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(4)
        )
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.mse_loss(self.head(x), y)


def batch_of() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 32, WIDTH, generator=generator)
    return {"x": x, "y": torch.tanh(x.roll(1, -1)) + 0.5 * x}


@pytest.mark.parametrize("layout", ["dp=2", "fsdp=2,zero=2"])
@pytest.mark.parametrize("algorithm", ["ring", "tree", "hierarchical"])
def test_any_algorithm_makes_the_sums_of_one_device(layout: str, algorithm: str, starter: RankStarter) -> None:
    techniques = Techniques(communication=Communication(algorithm=algorithm))
    comparison = verify(Model, batch_of(), layout=layout, steps=3, techniques=techniques, starter=starter)
    assert comparison.equal, str(comparison)
    assert comparison.worst_error <= 1e-5


def test_what_compression_leaves_out_is_not_compared_and_said(starter: RankStarter) -> None:
    techniques = Techniques(communication=Communication(gradients="topk:0.01"))
    comparison = verify(Model, batch_of(), layout="dp=2", techniques=techniques, starter=starter)
    assert comparison.equal, str(comparison)
    assert "tensors travelled as they are" in str(comparison)


def trained(rank: RankContext, layout: Layout, communication: Communication, steps: int = 30) -> tuple[float, int, int]:
    """(loss of the last step, bytes sent in a step, bytes saved in a step). Checks that copies of weights are equal."""
    torch.manual_seed(0)
    num = layout.num_micro_batches(SAMPLES)
    parts = split(batch_of(), micro_batches=num, replicas=layout.num_replicas, weights=lambda inputs: 1.0)
    techniques = Techniques(communication=communication)
    program = assemble(
        Model(), parts[0][0].inputs, layout=layout, rank=rank.rank, num_micro_batches=num, techniques=techniques
    )
    optimizer = torch.optim.Adam([state.parameter for state in program.states.values()], lr=2e-3)
    for step in range(steps):
        result = program.step(parts[program.place.replica], step=step)
        optimizer.step()
        optimizer.zero_grad()
        program.updated()
    if layout.dp == 2:
        own = torch.cat([parameter.detach().reshape(-1) for parameter in program.parameters.values()])
        everybody = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(everybody, own)
        assert torch.equal(*everybody)
    program.close()
    saved = sum(nbytes for kind, nbytes in result.sent_bytes.items() if kind.endswith(".saved"))
    return result.loss, sum(result.sent_bytes.values()) - saved, saved


@on_ranks(2, timeout_s=100.0)
@pytest.mark.parametrize("layout", ["dp=2", "fsdp=2,zero=2"])
def test_gradients_that_are_compressed_train_as_well(rank: RankContext, layout: str) -> None:
    known = Layout.parse(layout)
    exact, _, none = trained(rank, known, Communication())
    assert none == 0
    # of low rank or few, most of a step comes in later ones, and 30 are few
    limits = {"bf16": 1.01, "fp16": 1.01, "int8": 1.05, "powersgd:24": 1.2, "powersgd:4": 3.0, "topk:0.05": 3.0}
    for gradients, limit in limits.items():
        loss, _, saved = trained(rank, known, Communication(gradients=gradients))
        assert saved > 0
        assert exact / limit < loss < exact * limit, gradients


@on_ranks(2, timeout_s=100.0)
@pytest.mark.parametrize("activations, share", [("bf16", 0.5), ("fp16", 0.5), ("int8", 0.254)])
def test_activations_that_are_compressed_train_as_well(rank: RankContext, activations: str, share: float) -> None:
    layout = Layout.parse("pp=2,micro_batches=2")
    exact, whole, none = trained(rank, layout, Communication())
    assert none == 0
    loss, sent, saved = trained(rank, layout, Communication(activations=activations))
    assert loss == pytest.approx(exact, rel=0.1)
    assert sent == pytest.approx(share * whole, rel=0.02)
    assert sent + saved == whole
