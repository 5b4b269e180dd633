"""A module that draws its weights in `__init__` has the same bits on every layout."""

from __future__ import annotations

import pytest
import torch
from hand_written import TiedReader

from shardwise.execute.assemble import assemble, fill_from
from shardwise.execute.program import Program
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.testing import on_ranks
from shardwise.trace.deferred import defer
from shardwise.trace.placing import place


def loss(outputs: torch.Tensor, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs.flatten(0, 1), batch[0].flatten())


def laid_out(layout: Layout, rank: int) -> Program:
    blueprint = defer(lambda: TiedReader(vocabulary=31), seed=7)
    model = blueprint.module
    place(model, blueprint.materialize([name for name, _ in model.named_buffers()]))
    batch = (torch.arange(12).view(2, 6),)
    fill = fill_from(blueprint.materialize, "cpu")
    return assemble(model, batch, layout=layout, rank=rank, loss=loss, fill=fill)


@pytest.mark.parametrize("layout", ["dp=2", "pp=2", "dp=2,pp=2", "pp=4"])
@on_ranks(4)
def test_weights_are_bit_equal_on_every_layout(rank: RankContext, layout: str) -> None:
    chosen = Layout.parse(layout)
    if chosen.world_size < rank.world_size:
        chosen = Layout(dp=chosen.dp * rank.world_size // chosen.world_size, pp=chosen.pp)
    program = laid_out(chosen, rank.rank)
    held = {name: p.detach().clone() for name, p in program.parameters.items()}
    program.close()
    alone = laid_out(Layout(), 0)
    wanted = dict(alone.parameters)
    alone.close()
    assert held
    assert len(held) < len(wanted) or chosen.pp == 1
    assert all(torch.equal(weight, wanted[name]) for name, weight in held.items())
