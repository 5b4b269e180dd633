"""What a rank computes, keeps and exchanges is told before there is one: the numbers of a real step on real ranks."""

from __future__ import annotations

import collections
import functools
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import make
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.describe.kernels import ExchangeKind, KernelKind, Phase
from shardwise.describe.profile import CallProfile
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import select, split
from shardwise.execute.traced_profiles import TracedProfiles
from shardwise.launch import RankContext
from shardwise.layout import Layout, Precision, Techniques
from shardwise.testing import on_ranks
from shardwise.trace.deferred import defer
from shardwise.trace.objective import objective

torch.set_num_threads(1)
SAMPLES = 4  # of all replicas
NAMES = {
    ExchangeKind.ALL_REDUCE: "all_reduce",
    ExchangeKind.ALL_GATHER: "all_gather",
    ExchangeKind.REDUCE_SCATTER: "reduce_scatter",
    ExchangeKind.SEND: "send",
    ExchangeKind.ALL_TO_ALL: "all_to_all",
}


@functools.cache
def traced(name: str, precision: Precision | None = None) -> TracedProfiles:
    """One of a process: what several tests ask for is traced once."""
    example = make(name)
    batch = select(example.batch, range(SAMPLES), size=8)
    return TracedProfiles(example.model, batch, loss=example.loss, precision=precision)


def exchanged(profiles: TracedProfiles, layout: Layout) -> dict[str, int]:
    """Bytes of a forward and backward by kind, as ranks count them."""
    found: collections.Counter[str] = collections.Counter()
    for call in profiles.shard(layout, SAMPLES // layout.num_replicas).calls:
        for each in call.exchanges:
            found[f"{each.axis}.{NAMES[each.kind]}"] += each.nbytes * each.count
    return dict(found)


def real_step(
    name: str, layout: Layout, rank: RankContext, precision: Precision | None = None
) -> tuple[dict[str, int], int]:
    """Bytes that a rank sends inside units in a step, and those that autograd keeps of its only micro-batch."""
    example = make(name)
    batch = select(example.batch, range(SAMPLES), size=8)
    parts = split(batch, micro_batches=1, replicas=layout.num_replicas, weights=lambda _: 1.0)
    program = assemble(
        example.model,
        parts[0][0].inputs,
        layout=layout,
        rank=rank.rank,
        loss=example.loss,
        techniques=Techniques(precision=precision or Precision()),
    )
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
        pytest.param("mixtral", "tp=2", marks=pytest.mark.slow),
        pytest.param("llama", "cp=2", marks=pytest.mark.slow),
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
def test_a_rank_that_computes_in_sixteen_bits_exchanges_and_keeps_what_was_told(rank: RankContext) -> None:
    precision, layout = Precision(compute="bfloat16"), Layout(tp=2)
    profiles = traced("llama", precision)
    told = exchanged(profiles, layout)
    sent, kept = real_step("llama", layout, rank, precision)
    assert not profiles.reasons
    assert sent == told
    assert profiles.shard(layout, SAMPLES).saved_bytes == pytest.approx(kept, rel=0.01)


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


@pytest.mark.parametrize("name", ["llama", "bert", "mixtral", "whisper", "bart", "wav2vec2"])
def test_one_rank_alone_keeps_and_multiplies_what_the_whole_model_does(name: str) -> None:
    profiles = traced(name)
    whole, alone = profiles.whole(SAMPLES), profiles.shard(Layout(), SAMPLES)
    assert not profiles.reasons
    assert (alone.forward_flops, alone.backward_flops) == (whole.forward_flops, whole.backward_flops)
    assert alone.saved_bytes == pytest.approx(whole.saved_bytes, rel=0.01)
    assert [flops(one) for one in alone.calls] == [flops(other) for other in whole.calls]
    assert all(call.transient_bytes for call in alone.calls if call.backward_flops)


def flops(call: CallProfile) -> int:
    return sum(kernel.flops * kernel.count for kernel in call.kernels)


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


@pytest.mark.parametrize("layout", ["tp=2", "tp=2,sequence_parallel=on", "cp=2", "cp=2,context=ulysses"])
def test_functions_of_tokens_that_are_dealt_out_are_counted_in_the_forward(layout: str) -> None:
    shard = traced("llama").shard(Layout.parse(layout), SAMPLES)
    found = [k for call in shard.calls for k in call.kernels if k.kind is KernelKind.FUNCTION]
    assert {kernel.phase for kernel in found} <= {Phase.FORWARD}
    blocks = [call for call in shard.calls if ".layers." in call.unit]
    counts = {sum(k.count for k in call.kernels if k.kind is KernelKind.FUNCTION) for call in blocks}
    assert len(counts) == 1  # blocks that are alike, of which one runs and the others answer as it does
    assert (counts.pop() > 4) is (layout != "tp=2")  # two norms and two sums, at least


class Alive(TorchDispatchMode):
    """When storages come and go, in a run with values."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[tuple[int, int]] = []  # (which, bytes more or fewer)
        self.numbers: dict[int, int] = {}  # storage -> which
        self.references: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs))}
        for tensor in tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self.numbers:
                self._came(storage)
        return out

    def _came(self, storage: torch.UntypedStorage) -> None:
        key, which, size = storage._cdata, len(self.changes), storage.nbytes()
        self.numbers[key] = which
        self.changes.append((which, size))

        def gone(_: object) -> None:
            del self.numbers[key]
            self.changes.append((which, -size))

        self.references[which] = weakref.ref(storage, gone)

    def most(self, without: set[int]) -> int:
        """The most that was alive at once."""
        return max(itertools.accumulate(size for which, size in self.changes if which not in without))


@pytest.mark.parametrize("name", ["llama", "bert", "mixtral", "vit"])
def test_what_a_step_needs_at_most_is_what_is_kept_and_what_is_alive_besides(name: str) -> None:
    example = make(name)
    batch = select(example.batch, range(SAMPLES), size=8)
    with Alive() as alive:
        objective(example.model, batch, example.loss).backward()
    gradients = {
        parameter.grad.untyped_storage()._cdata
        for parameter in example.model.parameters()
        if parameter.grad is not None
    }
    most = alive.most({which for key, which in alive.numbers.items() if key in gradients})
    (work,) = traced(name).works(Layout(), SAMPLES)
    assert work.saved_bytes + max(work.transient_bytes, work.logits_bytes) == pytest.approx(most, rel=0.03)


def test_a_model_that_is_not_there_yet_is_told_as_one_that_is() -> None:
    example = make("llama")
    config = example.model.config
    blueprint = defer(lambda: type(example.model)(config), seed=0)
    batch = select(example.batch, range(SAMPLES), size=8)
    deferred = TracedProfiles(blueprint.module.train(), batch)
    for layout in (Layout(), Layout(tp=2)):
        assert deferred.works(layout, SAMPLES) == traced("llama").works(layout, SAMPLES)
    assert not deferred.reasons


def test_layouts_that_share_a_rank_share_its_trace() -> None:
    profiles = traced.__wrapped__("llama")
    first = profiles.shard(Layout(tp=2, pp=2), SAMPLES)
    assert profiles.shard(Layout(tp=2, dp=4), SAMPLES) is first
    layout = Layout(tp=2, pp=2, recompute="full")
    assert profiles(layout, SAMPLES) is profiles.works(layout, SAMPLES)


def test_sequences_that_are_too_short_are_not_dealt_out() -> None:
    profiles = traced("llama")  # of 12 tokens
    assert profiles.context_plan(Layout(cp=4)).units
    plan = profiles.context_plan(Layout(cp=8))
    assert not plan.units
    assert "12 tokens" in next(iter(plan.whole.values()))


def test_sixteen_bits_are_half_of_what_is_computed_sent_and_held() -> None:
    example = make("llama")
    held = {name: (id(parameter), parameter.dtype) for name, parameter in example.model.named_parameters()}
    whole, narrow = (
        TracedProfiles(example.model, example.batch, precision=Precision(compute=dtype)).shard(Layout(tp=2), 8)
        for dtype in ("float32", "bfloat16")
    )
    assert {k.dtype for call in narrow.calls for k in call.kernels if k.kind is KernelKind.MATMUL} == {"bfloat16"}
    assert narrow.saved_bytes < 0.8 * whole.saved_bytes  # norms, and what they keep, are in float32
    first, second = whole.calls[1].exchanges, narrow.calls[1].exchanges
    assert sum(e.nbytes * e.count for e in first) == 2 * sum(e.nbytes * e.count for e in second)
    assert held == {name: (id(parameter), parameter.dtype) for name, parameter in example.model.named_parameters()}


def test_what_needs_values_is_told_by_shares_and_by_name() -> None:
    profiles = traced.__wrapped__("wav2vec2")  # of its own: reasons are kept
    shard = profiles.shard(Layout(tp=2), SAMPLES)
    assert list(profiles.reasons) == ["tp=2"]  # layers that are left out by chance, a loss that looks at lengths
    assert shard.num_parameters < profiles.whole(SAMPLES).num_parameters
