"""A rank by itself holds and sends what it holds and sends in a real run, byte by byte."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import pytest
import torch
import torch.nn as nn
import transformers as hf

from shardwise.errors import LayoutError
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import MicroBatch, split
from shardwise.execute.traced_profiles import TracedProfiles
from shardwise.execute.weights import weigher
from shardwise.launch import RankContext, RankPool, RankStarter
from shardwise.layout import Layout
from shardwise.train.optimizer import optimizer_of
from shardwise.verify.rehearse import Rehearsed, rehearse
from shardwise.verify.rehearse_job import filling
from shardwise.verify.rehearse_memory import LiveBytes, RehearsalMode

TOKENS, VOCABULARY = 16, 64


def llama(hidden: int = 32) -> nn.Module:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        use_cache=False,
    )
    model: nn.Module = hf.LlamaForCausalLM(config)
    return model.train()


def micro_batches(model: nn.Module, layout: Layout) -> Sequence[Sequence[MicroBatch]]:
    count = layout.num_micro_batches(2 * layout.pp * layout.num_replicas)
    ids = torch.arange(count * layout.num_replicas * TOKENS).view(-1, TOKENS) % VOCABULARY
    batch = {"input_ids": ids, "labels": ids.clone()}
    parts = split(batch, micro_batches=count, replicas=layout.num_replicas, weights=weigher(model))
    return [[_own(micro_batch) for micro_batch in replica] for replica in parts]


def _own(micro_batch: MicroBatch) -> MicroBatch:
    """With memory of its own size, as samples of a task have."""
    return dataclasses.replace(micro_batch, inputs={name: t.clone() for name, t in micro_batch.inputs.items()})


def rehearsed(layout: Layout, rank: int) -> Rehearsed:
    model = llama()
    parts = micro_batches(model, layout)
    profiles = TracedProfiles(model, parts[0][0].inputs, proof_batch=parts[0][0].inputs)
    return rehearse(
        model, lambda replica: parts[replica], layout=layout, rank=rank, profiles=profiles, optimizer=optimizer_of
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Real:
    """Of the fourth step of a real run."""

    sent_bytes: Mapping[str, int]
    peak_bytes: int


def real_step(context: RankContext, layout: Layout) -> Real:
    model = llama()
    parts = micro_batches(model, layout)
    program = assemble(model, parts[0][0].inputs, layout=layout, rank=context.rank)
    optimizer = optimizer_of(program)
    assert optimizer is not None
    own = parts[program.place.replica]

    def step(number: int) -> Mapping[str, int]:
        sent = program.step(own, step=number).sent_bytes
        program.gradient_norm()
        optimizer.step()
        program.updated()
        optimizer.zero_grad(set_to_none=True)
        return sent

    for number in range(3):
        step(number)
    live = LiveBytes(torch.device("cpu"))
    live.adopt([*program.parameters.values(), *model.buffers(), *(t for mb in own for t in mb.inputs.values())])
    live.adopt(value for state in optimizer.state.values() for value in state.values())
    with RehearsalMode(live):
        live.begin()
        sent = dict(step(3))
    program.close()
    return Real(sent_bytes=sent, peak_bytes=live.peak.nbytes)


def real(layout: Layout, starter: RankStarter) -> list[Real]:
    with RankPool(layout.world_size, starter=starter, num_threads=1) as ranks:
        return ranks.run(real_step, layout, timeout_s=60)


@pytest.mark.parametrize(
    ("text", "apart"),
    [
        ("pp=2", 1e-4),
        # buckets of a real run are in memory that ranks share, rounded up
        pytest.param("dp=2", 1e-2, marks=pytest.mark.slow),
        pytest.param("pp=2,schedule=zb-h1", 1e-4, marks=pytest.mark.slow),
        pytest.param("pp=2,recompute=full", 1e-4, marks=pytest.mark.slow),
    ],
)
def test_bytes_held_and_sent_are_those_of_a_real_run(text: str, apart: float, starter: RankStarter) -> None:
    layout = Layout.parse(text)
    for rank, expected in enumerate(real(layout, starter)):
        found = rehearsed(layout, rank)
        assert found.sent_bytes == expected.sent_bytes
        assert found.peak_bytes == pytest.approx(expected.peak_bytes, rel=apart)


@pytest.mark.slow
def test_divided_state_is_reduced_as_in_a_real_run_whose_ranks_read_each_others_parameters_in_place(
    starter: RankStarter,
) -> None:
    layout = Layout.parse("fsdp=2")
    expected = real(layout, starter)[1].sent_bytes
    found = rehearsed(layout, 1).sent_bytes
    assert found["fsdp.reduce_scatter"] == expected["fsdp.reduce_scatter"] > 0
    assert expected["fsdp.all_gather"] == 0 < found["fsdp.all_gather"]  # on several hosts it is sent


@pytest.mark.parametrize(
    "text",
    [
        "tp=2",
        pytest.param("cp=2,context=ulysses", marks=pytest.mark.slow),
        pytest.param("dp=2,pp=2", marks=pytest.mark.slow),
    ],
)
def test_bytes_sent_are_those_of_a_real_run(text: str, starter: RankStarter) -> None:
    layout = Layout.parse(text)
    rank = layout.world_size - 1
    assert rehearsed(layout, rank).sent_bytes == real(layout, starter)[rank].sent_bytes


def test_lines_and_actions_account_for_the_peak() -> None:
    found = rehearsed(Layout(pp=2), 0)
    assert found.lines.total == found.peak_bytes == max(behind.highest for behind in found.actions)
    assert [behind.action for behind in found.actions] == [
        "0F0", "0F1", "0B0", "0F2", "0B1", "0F3", "0B2", "0B3", "optimizer",
    ]  # fmt: skip
    weights = found.lines.parameters
    assert found.lines.gradients == weights
    assert found.lines.optimizer == pytest.approx(2 * weights, rel=1e-2)


def test_a_rank_of_a_world_that_is_not_there() -> None:
    layout = filling(Layout(pp=2), 1024)
    assert layout.dp == 512
    one = rehearsed(dataclasses.replace(layout, dp=2), 3)
    many = rehearsed(layout, 1023)
    assert many.lines == one.lines  # replicas are alike
    assert many.stages == (1,)


def test_a_world_that_no_number_of_replicas_fills_is_refused() -> None:
    with pytest.raises(LayoutError, match="a multiple of 3, but got 64"):
        filling(Layout(pp=3), 64)


def test_a_rank_that_there_is_not_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"has ranks 0\.\.1, but rank 2"):
        rehearsed(Layout(pp=2), 2)
