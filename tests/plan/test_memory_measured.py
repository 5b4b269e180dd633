"""What a real step holds at most beside what is predicted, in bytes of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers as hf
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.execute.traced_profiles import TracedProfiles
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.plan.in_flight import kept_micro_batches
from shardwise.plan.job import Job
from shardwise.plan.lines import MemoryLines
from shardwise.plan.memory import memory_lines
from shardwise.plan.sources import source_of
from shardwise.testing import on_ranks
from shardwise.train.optimizer import optimizer_of

VOCABULARY, TOKENS = 256, 64


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes of tensors that are alive at once, those of `before` included; memory that ranks share is not."""

    def __init__(self, before: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        held = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in before}
        self._before = held.keys()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._now = self.most = sum(held.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, list | tuple) else (out,):
            if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and leaf.dtype is not torch.uint8:
                self._add(leaf.untyped_storage())
        if self._now > self.most:
            self._forget()
            self.most = max(self.most, self._now)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._before or storage.device.type != "cpu" or storage.is_shared():
            return
        if key in self._made and self._made[key][0].expired():  # type: ignore[no-untyped-call]
            self._now -= self._made.pop(key)[1]
        if key not in self._made:
            weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._made[key] = weak, storage.nbytes()
            self._now += storage.nbytes()

    def _forget(self) -> None:
        gone = [key for key, (weak, _) in self._made.items() if weak.expired()]  # type: ignore[no-untyped-call]
        for key in gone:
            self._now -= self._made.pop(key)[1]


def llama() -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=VOCABULARY, use_cache=False, **sizes))


def batch_of(samples: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(samples * TOKENS).view(samples, TOKENS) % VOCABULARY
    return {"input_ids": ids, "labels": ids}


def loss_of(outputs: Any, batch: Any) -> torch.Tensor:
    found: torch.Tensor = outputs.loss
    return found


def measured(layout: Layout, samples: int, rank: int) -> tuple[int, int]:
    """Bytes of the second of two training steps on a rank, and its place in the pipeline."""
    count = layout.num_micro_batches(samples)
    parts = split(batch_of(samples), micro_batches=count, replicas=layout.num_replicas, weights=lambda _: 1.0)
    program = assemble(llama(), parts[0][0].inputs, layout=layout, rank=rank, loss=loss_of, num_micro_batches=count)
    optimizer = optimizer_of(program)
    assert optimizer is not None
    with Peak(program.parameters.values()) as peak:
        for step in range(2):
            program.step(parts[program.place.replica], step=step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    program.close()
    return peak.most, program.place.position


def foretold(layout: Layout, samples: int) -> list[MemoryLines]:
    """[place]"""
    count = layout.num_micro_batches(samples)
    profiles = TracedProfiles(llama(), batch_of(samples // (count * layout.num_replicas)), loss=loss_of)
    works = profiles.works(layout, samples // (count * layout.num_replicas), num_micro_batches=count)
    source = source_of(layout)
    assert source is not None
    schedule = source(count)
    kept = kept_micro_batches(schedule, works)
    return [
        memory_lines(
            [works[stage] for stage in own],
            layout,
            Job(global_batch=samples),
            num_micro_batches=count,
            in_flight=[kept[stage] for stage in own],
        )
        for own in schedule.ranks
    ]


@pytest.mark.parametrize("text", ["micro_batches=1", "micro_batches=4"])
def test_on_one_rank_a_step_holds_what_is_foretold_to_a_thousandth(text: str) -> None:
    layout = Layout.parse(text)
    (lines,) = foretold(layout, 8)
    most, _ = measured(layout, 8, 0)
    assert lines.total == pytest.approx(most, rel=1e-3)


@pytest.mark.parametrize("how", ["full", "selective"])
def test_where_units_are_computed_again_it_holds_no_more_and_hardly_less(how: str) -> None:
    layout = Layout(micro_batches=2, recompute=how)
    (lines,) = foretold(layout, 8)
    most, _ = measured(layout, 8, 0)
    assert most <= lines.total * 1.001
    assert lines.total <= most * 1.02  # a unit's own tensors are freed one by one while it is computed again


@pytest.mark.slow
@on_ranks(2, timeout_s=120.0)
def test_on_two_ranks_too(rank: RankContext) -> None:
    """Messages and the buckets that replicas sum in apart: both are in memory that ranks share."""
    torch.set_num_threads(1)
    for text in ("dp=2,micro_batches=2", "pp=2,micro_batches=4,schedule=gpipe"):
        layout = Layout.parse(text)
        most, place = measured(layout, 16, rank.rank)
        lines = foretold(layout, 16)[place]
        buckets = lines.parameters if layout.dp > 1 else 0.0  # float32, as the parameters are
        assert lines.total - buckets == pytest.approx(most, rel=0.01), text
