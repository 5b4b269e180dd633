"""The contenders of the tensor benchmark compute the same and move what they must; figures are ratios of steps."""

from __future__ import annotations

import torch
import torch.distributed as dist

from benchmarks.tensor.contenders import DTENSOR, MEGATRON, MEGATRON_WORDS, OURS, TRANSFORMERS
from benchmarks.tensor.counted import Counted
from benchmarks.tensor.megatron_peer import packed
from benchmarks.tensor.model import SHAPES, Shape, needed_bytes, vocabulary_bytes
from benchmarks.tensor.ranks import Timed, timed_steps
from benchmarks.tensor.run import _figures
from shardwise.launch import RankContext
from shardwise.testing import on_ranks

SMALL = Shape(name="small", hidden=16, heads=2, width=24, sequence=4, blocks=2, vocabulary=32)


@on_ranks(2)
def test_shardwise_and_dtensor_have_the_gradients_of_one_process_and_move_no_more_than_needed(
    rank: RankContext,
) -> None:
    timed = timed_steps(rank, "decoder", (OURS, DTENSOR), SMALL, 2)  # raises where a loss or a gradient differs
    assert {name: len(of.seconds) for name, of in timed.items()} == {OURS: 2, DTENSOR: 2}
    words = vocabulary_bytes(SMALL)  # no logits
    assert timed[OURS].nbytes == {"tensor": needed_bytes(SMALL) + words, "world": 8}  # and the loss in float64
    assert timed[DTENSOR].nbytes == {"tensor": needed_bytes(SMALL)}


@on_ranks(2)
def test_collectives_are_counted_by_what_a_rank_hands_over(rank: RankContext) -> None:
    group = dist.new_group([0, 1])
    with Counted() as counted:
        dist.all_reduce(torch.ones(3))
        dist.all_gather([torch.empty(5), torch.empty(5)], torch.ones(5), group=group)
        dist.barrier()
    assert (counted.calls, counted.nbytes, counted.world_nbytes) == (2, 12 + 20, 12)
    dist.destroy_process_group(group)


def test_two_outputs_and_two_input_gradients_of_a_block_are_summed() -> None:
    assert needed_bytes(SHAPES["512"]) == 8 * 4 * (2 * 64 * 512) * 4


def test_megatron_packs_each_ranks_parts_together() -> None:
    q, k, v = (torch.arange(4.0).view(4, 1) + 10 * i for i in range(3))
    wholes = {f"layers.0.attention.{name}.weight": part for name, part in zip("qkv", (q, k, v), strict=True)}
    assert packed("layers.0.attention.qkv.weight", wholes, rank=1).flatten().tolist() == [2, 3, 12, 13, 22, 23]
    row = {"layers.3.mlp.down.weight": torch.arange(4.0).view(1, 4)}
    assert packed("layers.3.mlp.fc2.weight", row, rank=0).tolist() == [[0, 1]]
    assert packed("norm.weight", {"norm.weight": q}, rank=1) is q


def timed(seconds: tuple[float, ...], nbytes: int) -> Timed:
    return Timed(seconds=seconds, nbytes={"tensor": nbytes})


def test_a_figure_is_the_median_of_the_slower_ranks_paired_ratios() -> None:
    ours = [timed((1.0, 1.0, 1.0), 100), timed((1.0, 2.0, 1.0), 100)]  # of the slower rank: 1, 2, 1
    theirs = [timed((2.0, 2.0, 5.0), 200), timed((1.0, 4.0, 1.0), 200)]  # 2, 4, 5
    measured = {
        ("decoder", "512"): {OURS: ours, DTENSOR: theirs, MEGATRON: theirs, MEGATRON_WORDS: ours},
        ("llama", "512"): {OURS: ours, TRANSFORMERS: ours},
    }
    memory = {
        OURS: [(90, 1, 95), (80, 1, 95)],
        DTENSOR: [(100, 1, 95)] * 2,
        MEGATRON_WORDS: [(100, 1, 95), (50, 1, 95)],
    }
    assert _figures(measured, memory) == {
        "h256_vs_dtensor": None,
        "h512_vs_dtensor": 0.5,
        "h1024_vs_dtensor": None,
        "h512_vs_transformers": 1.0,
        "h512_vs_megatron": 1.0,  # the better of the two
        "bytes_vs_megatron": 1.0,
        "peak_memory_vs_dtensor": 0.9,
        "peak_memory_vs_megatron": 1.6,
    }
