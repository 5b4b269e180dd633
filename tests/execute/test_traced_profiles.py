"""What a rank computes, keeps and exchanges is told before there is one: the numbers of a real step on real ranks."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import make

from shardwise.describe.kernels import ExchangeKind
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import select, split
from shardwise.execute.traced_profiles import TracedProfiles
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.testing import on_ranks

torch.set_num_threads(1)
SAMPLES = 4  # of all replicas
NAMES = {
    ExchangeKind.ALL_REDUCE: "all_reduce",
    ExchangeKind.ALL_GATHER: "all_gather",
    ExchangeKind.REDUCE_SCATTER: "reduce_scatter",
    ExchangeKind.SEND: "send",
    ExchangeKind.ALL_TO_ALL: "all_to_all",
}


def traced(name: str) -> TracedProfiles:
    example = make(name)
    return TracedProfiles(example.model, select(example.batch, range(SAMPLES), size=8), loss=example.loss)


def exchanged(profiles: TracedProfiles, layout: Layout) -> dict[str, int]:
    """Bytes of a forward and backward by kind, as ranks count them."""
    found: collections.Counter[str] = collections.Counter()
    for call in profiles.shard(layout, SAMPLES // layout.num_replicas).calls:
        for each in call.exchanges:
            found[f"{each.axis}.{NAMES[each.kind]}"] += each.nbytes * each.count
    return dict(found)


def real_step(name: str, layout: Layout, rank: RankContext) -> tuple[dict[str, int], int]:
    """Bytes that a rank sends inside units in a step, and those that autograd keeps of its only micro-batch."""
    example = make(name)
    batch = select(example.batch, range(SAMPLES), size=8)
    parts = split(batch, micro_batches=1, replicas=layout.num_replicas, weights=lambda _: 1.0)
    program = assemble(example.model, parts[0][0].inputs, layout=layout, rank=rank.rank, loss=example.loss)
    own = parts[program.place.replica]
    program.step(own, step=0)  # with headers
    given = [*tensors(own[0].inputs), *example.model.parameters(), *example.model.buffers()]
    known = {tensor.untyped_storage()._cdata for tensor in given}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sent = dict(program.step(own, step=1).sent_bytes)
    program.close()
    once_a_step = ("dp.all_reduce", "tp.gradients")
    return {what: n for what, n in sent.items() if n and what not in once_a_step}, sum(
        storage.nbytes() for storage in kept.values()
    )


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    yield from (leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))


@on_ranks(2, timeout_s=120.0)
@pytest.mark.parametrize(
    "name, layout",
    [
        ("llama", "tp=2"),
        ("bert", "tp=2,sequence_parallel=on"),
        ("mixtral", "tp=2"),
        ("llama", "cp=2"),
        ("bert", "cp=2,context=ulysses"),
    ],
)
def test_a_rank_exchanges_and_keeps_what_was_told(rank: RankContext, name: str, layout: str) -> None:
    profiles, wanted = traced(name), Layout.parse(layout)
    told = exchanged(profiles, wanted)
    if "ulysses" in layout:
        told["cp.send"] = told.pop("cp.all_to_all")  # ranks count messages
    sent, kept = real_step(name, wanted, rank)
    assert not profiles.reasons
    assert sent == told
    # labels and position numbers that a step makes anew; what a unit drops again in its forward
    assert profiles.shard(wanted, SAMPLES).saved_bytes == pytest.approx(kept, rel=0.01)


@on_ranks(2, timeout_s=120.0)
def test_ranks_that_divide_experts_send_on_average_what_was_told(rank: RankContext) -> None:
    profiles, layout = traced("mixtral"), Layout(ep=2)
    told = exchanged(profiles, layout)
    sent, kept = real_step("mixtral", layout, rank)
    both = torch.tensor([float(sent["ep.all_to_all"]), float(kept)])
    dist.all_reduce(both)
    mean_sent, mean_kept = (both / 2).tolist()
    assert not profiles.reasons
    assert told["ep.all_to_all"] == pytest.approx(mean_sent, rel=0.02)  # a router at random is nearly even
    assert profiles.shard(layout, SAMPLES // 2).saved_bytes == pytest.approx(mean_kept, rel=0.04)


@pytest.mark.parametrize("name", ["llama", "bert", "mixtral", "whisper"])
def test_one_rank_alone_keeps_and_multiplies_what_the_whole_model_does(name: str) -> None:
    profiles = traced(name)
    whole, alone = profiles.whole(SAMPLES), profiles.shard(Layout(), SAMPLES)
    assert not profiles.reasons
    assert (alone.forward_flops, alone.backward_flops) == (whole.forward_flops, whole.backward_flops)
    assert alone.saved_bytes == pytest.approx(whole.saved_bytes, rel=0.01)
    assert all(call.transient_bytes for call in alone.calls if call.backward_flops)


def test_shards_have_a_share_of_products_and_parameters_and_send_their_tokens() -> None:
    profiles = traced("llama")
    whole = profiles.whole(SAMPLES)
    shard = profiles.shard(Layout.parse("tp=2,sequence_parallel=on"), SAMPLES)
    assert shard.forward_flops == pytest.approx(whole.forward_flops / 2, rel=0.01)
    assert shard.num_parameters < 0.51 * whole.num_parameters
    for layout, share in (("pp=2,tp=2", 1.0), ("pp=2,tp=2,sequence_parallel=on", 0.5), ("pp=2,cp=2", 0.5)):
        first, last = profiles.works(Layout.parse(layout), SAMPLES)
        one, _ = profiles.works(Layout(pp=2), SAMPLES)
        assert first.sends[1] == share * one.sends[1]
        assert last.logits_bytes > 0
        assert first.logits_bytes == 0


def test_layouts_that_share_a_rank_share_its_trace() -> None:
    profiles = traced("llama")
    first = profiles.shard(Layout(tp=2, pp=2), SAMPLES)
    assert profiles.shard(Layout(tp=2, dp=4), SAMPLES) is first
    layout = Layout(tp=2, pp=2, recompute="full")
    assert profiles(layout, SAMPLES) is profiles.works(layout, SAMPLES)


def test_what_needs_values_is_told_by_shares_and_by_name() -> None:
    profiles = traced("wav2vec2")
    shard = profiles.shard(Layout(tp=2), SAMPLES)
    assert list(profiles.reasons) == ["tp=2"]  # layers that are left out by chance, a loss that looks at lengths
    assert shard.num_parameters < profiles.whole(SAMPLES).num_parameters
