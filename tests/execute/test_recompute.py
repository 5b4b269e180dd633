"""Units that are computed again: the same bits as without, written buffers once, and less kept, as planned."""

from __future__ import annotations

import pytest
import torch
from models import make

from one_step import BATCH, Blocks, assert_same, kept_bytes, llama, plain, run
from shardwise.errors import DataflowError
from shardwise.execute.kept_results import KeptResults
from shardwise.trace.profile import trace


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("around", [False, True])
def test_blocks_with_dropout_and_statistics_have_the_bits_of_plain_ones(
    recompute: str, own: bool, around: bool
) -> None:
    whole = run(Blocks(), "none")
    ran = run(Blocks(own, around=around), recompute)
    assert_same(ran, whole)
    assert whole.runs == [2, 2, 2]  # two micro-batches
    assert ran.runs == [4, 4, 4]  # a checkpoint of the model's own does not repeat it once more


@pytest.mark.parametrize("name", ["llama", "bert", "resnet", "t5", "mixtral"])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_models_have_the_gradients_of_plain_ones(name: str, recompute: str) -> None:
    example = make(name)
    ran = run(example.model, recompute, batch=example.batch, loss=example.loss)
    assert_same(ran, plain(name))


def test_a_budget_computes_again_what_it_must() -> None:
    model = Blocks()
    whole = trace(model, {"x": BATCH["x"][:16]}).saved_bytes
    ran = run(model, f"{round(whole * 0.9)}B")
    assert_same(ran, run(Blocks(), "none"))
    assert sorted(set(ran.runs)) == [2, 4]


def test_less_is_kept_as_planned() -> None:
    """Of the four blocks of a small llama; its head and loss keep the same."""
    none, selective, full = (kept_bytes(how) for how in ("none", "selective", "full"))
    assert full < selective < none
    profile = trace(llama().model, llama().batch)
    blocks = [call for call in profile.calls if "layers" in call.unit]
    saved = sum(call.saved_bytes for call in blocks)
    planned_full = saved - sum(call.output_bytes for call in blocks)
    planned_selective = saved - sum((call.product_bytes or 0) + call.output_bytes for call in blocks)
    assert none - full == pytest.approx(planned_full, rel=0.05)
    assert none - selective == pytest.approx(planned_selective, rel=0.05)


def test_a_result_that_is_written_later_is_computed_again() -> None:
    weight = torch.randn(4, 4)
    x = torch.randn(2, 4)

    def forward(factor: float) -> torch.Tensor:
        y = x @ weight
        y.mul_(2)  # as a sum over ranks in place
        return (x @ weight) * factor + y

    kept = KeptResults(frozenset)
    with kept.first():
        expected = forward(3.0)
    assert kept.nbytes == 2 * 4 * 4  # the second product alone
    with kept.again():
        assert torch.equal(forward(3.0), expected)


def test_another_way_through_the_unit_is_an_error() -> None:
    kept = KeptResults(frozenset)
    x = torch.randn(2, 2)
    with kept.first():
        x @ x
    with kept.again(), pytest.raises(DataflowError, match="nothing more"):
        x @ x @ x
