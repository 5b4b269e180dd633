"""The contenders of the pipeline benchmark compute the same; the figures are ratios of paired steps."""

from __future__ import annotations

from benchmarks.pipeline.contenders import OURS, TORCH
from benchmarks.pipeline.model import Shape
from benchmarks.pipeline.ranks import timed_steps
from benchmarks.pipeline.run import _figures
from shardwise.launch import RankContext
from shardwise.testing import on_ranks

SMALL = Shape(name="small", hidden=16, heads=2, width=32, sequence=4, blocks=2, vocabulary=32)


@on_ranks(2)
def test_shardwise_and_torch_have_the_gradients_of_one_process(rank: RankContext) -> None:
    seconds = timed_steps(rank, (OURS, *TORCH), SMALL, 2)  # raises where a loss or a gradient differs
    assert {name: len(steps) for name, steps in seconds.items()} == dict.fromkeys((OURS, *TORCH), 2)


def test_a_figure_is_the_worse_median_of_paired_ratios() -> None:
    torch_steps = {TORCH[0]: [2.0, 2.0, 4.0], TORCH[1]: [2.0, 4.0, 6.0]}
    steps = {OURS: [1.0, 2.0, 3.0], **torch_steps, "megatron 1f1b": [1.0, 4.0, 2.0]}
    memory = {OURS: [(90, 10), (80, 10)], TORCH[0]: [(100, 10), (100, 10)], TORCH[1]: [(200, 10), (90, 10)]}
    assert _figures({"tiny": steps, "large-64": steps}, memory) == {
        "tiny_vs_torch": 0.75,
        "large_vs_torch": 0.75,
        "large_vs_best_peer": 1.0,
        "peak_memory_vs_torch": 0.9,
    }
