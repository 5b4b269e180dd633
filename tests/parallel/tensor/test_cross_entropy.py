"""Cross-entropy of divided logits equals torch's of whole ones: values, gradients, ignored targets, smoothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from shardwise.errors import DataflowError
from shardwise.launch import RankContext
from shardwise.parallel.tensor.cross_entropy import vocab_parallel_cross_entropy
from shardwise.parallel.tensor.processes import ProcessTensorGroup
from shardwise.parallel.tensor.slices import cut, spread
from shardwise.parallel.tensor.threads import ThreadGroup, on_threads
from shardwise.testing import on_ranks


def logits_and_targets(vocabulary: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(*shape, vocabulary, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, vocabulary, shape, generator=generator)


def assert_equal_to_torch(tp: int, logits: torch.Tensor, target: torch.Tensor, **settings: Any) -> None:
    vocabulary = logits.shape[-1]
    whole = logits.clone().requires_grad_(True)
    expected = F.cross_entropy(whole.flatten(0, -2), target.flatten(), **settings)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    expected.backward(upstream)
    assert whole.grad is not None

    def work(group: ThreadGroup) -> tuple[torch.Tensor, torch.Tensor]:
        local = cut(logits, spread(-1, vocabulary, tp), group.rank).requires_grad_(True)
        loss = vocab_parallel_cross_entropy(local, target, vocabulary=vocabulary, group=group, **settings)
        loss.backward(upstream.view(loss.shape))
        assert local.grad is not None
        return loss.detach(), local.grad

    for rank, (loss, gradient) in enumerate(on_threads(tp, work)):
        torch.testing.assert_close(loss.flatten(), expected.detach().flatten(), rtol=1e-12, atol=1e-12, equal_nan=True)
        own = cut(whole.grad, spread(-1, vocabulary, tp), rank)
        torch.testing.assert_close(gradient, own, rtol=1e-12, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_odd_vocabulary_on_any_number_of_ranks(tp: int, smoothing: float, reduction: str) -> None:
    logits, target = logits_and_targets(13, 3, 5)
    target[0, :3] = -100
    assert_equal_to_torch(tp, logits, target, label_smoothing=smoothing, reduction=reduction)


@pytest.mark.parametrize("ignored", [0, 6, -1])
def test_any_id_may_be_the_ignored_one(ignored: int) -> None:
    logits, target = logits_and_targets(7, 12)
    target[::3] = ignored
    assert_equal_to_torch(2, logits, target, ignore_index=ignored, label_smoothing=0.2)


def test_a_mean_over_no_target_is_not_a_number_as_in_torch() -> None:
    logits, target = logits_and_targets(7, 2, 2)
    assert_equal_to_torch(2, logits, torch.full_like(target, -100))


def test_large_logits_and_masked_columns_do_not_overflow() -> None:
    logits, target = logits_and_targets(8, 6)
    logits[:, 4:] = float("-inf")  # all that rank 1 has
    logits[0, 1] = 1e4
    assert_equal_to_torch(2, logits, target % 4, reduction="sum")


def test_half_precision_is_summed_in_float32() -> None:
    logits, target = logits_and_targets(9, 4)
    logits = logits.bfloat16()

    def work(group: ThreadGroup) -> tuple[torch.Tensor, torch.Tensor | None]:
        local = cut(logits, spread(-1, 9, 2), group.rank).requires_grad_(True)
        loss = vocab_parallel_cross_entropy(local, target, vocabulary=9, group=group)
        loss.backward()
        return loss.detach(), local.grad

    for loss, gradient in on_threads(2, work):
        assert loss.dtype == torch.bfloat16
        assert gradient is not None
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(loss, F.cross_entropy(logits, target))


def test_a_target_outside_of_the_vocabulary_fails_on_every_rank_as_in_torch() -> None:
    logits, _ = logits_and_targets(7, 2)

    def work(group: ThreadGroup, wrong: int) -> str:
        local = cut(logits, spread(-1, 7, 2), group.rank)
        with pytest.raises((IndexError, RuntimeError), match="out of bounds") as raised:
            vocab_parallel_cross_entropy(local, torch.tensor([0, wrong]), vocabulary=7, group=group)
        return str(raised.value)

    for wrong in (7, -1):
        assert len(on_threads(2, lambda group, wrong=wrong: work(group, wrong))) == 2  # type: ignore[misc]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"reduction": "average"}, "a reduction is"),
        ({"label_smoothing": 2.0}, "lies between 0 and 1"),
        ({"target": torch.zeros(3, dtype=torch.long)}, "targets are ids, one for each row"),
        ({"target": torch.zeros(2)}, "these are torch.float32"),
        ({"vocabulary": 9}, "has 4 columns of 9 logits, but these are 3"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"target": torch.zeros(2, dtype=torch.long), "vocabulary": 7, **changed}

    def work(group: ThreadGroup) -> None:
        if group.rank == 0:
            vocab_parallel_cross_entropy(torch.zeros(2, 3), group=group, **given)

    with pytest.raises(DataflowError, match=message):
        on_threads(2, work)


@on_ranks(2)
def test_processes_do_as_threads_do_and_gather_no_logits(rank: RankContext) -> None:
    process_group = dist.new_group([0, 1])
    group = ProcessTensorGroup(process_group)
    logits, target = logits_and_targets(11, 3, 4)
    local = cut(logits, spread(-1, 11, 2), rank.rank).requires_grad_(True)
    loss = vocab_parallel_cross_entropy(local, target, vocabulary=11, group=group)
    loss.backward()
    whole = logits.clone().requires_grad_(True)
    expected = F.cross_entropy(whole.flatten(0, 1), target.flatten())
    expected.backward()

    assert whole.grad is not None
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(local.grad, cut(whole.grad, spread(-1, 11, 2), rank.rank))
    assert group.reduced_bytes == 3 * target.numel() * 8  # largest, sum of exponentials, own logit
    dist.destroy_process_group(process_group)
