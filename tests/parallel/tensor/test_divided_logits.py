"""Divided logits are whole to whoever reads them, and joined only where they must be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from shardwise.describe.tensor import UnitPlan
from shardwise.errors import DataflowError
from shardwise.parallel.tensor.divided_logits import DividedLogits, Reads, whole_of
from shardwise.parallel.tensor.install import shard_unit
from shardwise.parallel.tensor.slices import cut, spread
from shardwise.parallel.tensor.threads import ThreadGroup, on_threads

V = 7
LOGITS = torch.randn(2, 5, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGET = torch.tensor([[1, 6, -100, 0, 3], [2, 2, 5, -100, 4]])
BIAS = torch.randn(1, V, dtype=torch.float64)


class Counted:
    """A group that notes how many elements each collective has."""

    def __init__(self, group: ThreadGroup) -> None:
        self._group = group
        self.rank, self.size = group.rank, group.size
        self.sizes: list[int] = []

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sizes.append(tensor.numel())
        return self._group.all_reduce(tensor)

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sizes.append(tensor.numel())
        return self._group.all_reduce_max(tensor)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sizes.append(tensor.numel() * self.size)
        return self._group.all_gather(tensor)

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sizes.append(tensor.numel())
        return self._group.reduce_scatter(tensor)


def assert_equal(code: Callable[[torch.Tensor], torch.Tensor], *, joins: bool) -> None:
    """A model's code on divided logits gives the loss and gradient of whole ones; and whether it joins them."""
    whole = LOGITS.clone().requires_grad_(True)
    expected = code(whole)
    expected.backward()
    assert whole.grad is not None
    part = spread(-1, V, 2)

    def work(threads: ThreadGroup) -> None:
        group = Counted(threads)
        local = cut(LOGITS, part, group.rank).requires_grad_(True)
        loss = code(DividedLogits(local, part, group))
        assert not isinstance(loss, DividedLogits)
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(local.grad, cut(whole.grad, part, group.rank), rtol=1e-12, atol=1e-12)
        assert joins == any(size % V == 0 for size in group.sizes), group.sizes

    on_threads(2, work)


def shifted(logits: torch.Tensor) -> torch.Tensor:
    """As language models in transformers do it."""
    rows = logits.float().double()[..., :-1, :].contiguous().view(-1, V)
    return F.cross_entropy(rows, TARGET[..., 1:].flatten().to(rows.device), ignore_index=-100, reduction="sum") / 7


KEPT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "shifted": lambda x: F.cross_entropy(x[:, :-1].reshape(-1, x.size(-1)), TARGET[:, 1:].reshape(-1)),
    "flattened": lambda x: F.cross_entropy(x.flatten(0, 1), TARGET.flatten(), label_smoothing=0.1),
    "a module": lambda x: nn.CrossEntropyLoss()(x.view(-1, x.shape[-1]), TARGET.view(-1)),
    "capped": lambda x: F.cross_entropy((torch.tanh(x / 3.0) * 3.0).flatten(0, 1), TARGET.flatten()),
    "a bias that is no parameter": lambda x: F.cross_entropy((x + BIAS).flatten(0, 1), TARGET.flatten()),
    "one sample": lambda x: F.cross_entropy(x[1], TARGET[1]),
    "one place": lambda x: F.cross_entropy(x[:, 0, :], TARGET[:, 0]),
    "unsqueezed and squeezed": lambda x: F.cross_entropy(x.unsqueeze(0).squeeze(0).flatten(0, 1), TARGET.flatten()),
    "asked for what they are": lambda x: (
        F.cross_entropy(x.flatten(0, 1), TARGET.flatten())
        if (x.dtype, x.dim(), x.requires_grad, tuple(x.shape)) == (torch.float64, 3, True, (2, 5, V))
        else x.sum()
    ),
}


@pytest.mark.parametrize("code", KEPT.values(), ids=KEPT)
def test_what_keeps_the_vocabulary_apart_joins_nothing(code: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert_equal(code, joins=False)


def test_the_loss_of_language_models_in_transformers_joins_nothing() -> None:
    part = spread(-1, V, 2)

    def work(threads: ThreadGroup) -> None:
        group = Counted(threads)
        logits = DividedLogits(cut(LOGITS, part, group.rank), part, group)
        torch.testing.assert_close(shifted(logits), shifted(LOGITS), rtol=1e-6, atol=1e-6)
        assert all(size % V for size in group.sizes)

    on_threads(2, work)


WEIGHT = torch.rand(V, dtype=torch.float64)
JOINED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a sum of squares": lambda x: x.square().sum(),
    "columns": lambda x: x[..., 2:5].sum(),
    "one column": lambda x: x[:, :, 3].sum(),
    "a mask": lambda x: x[TARGET > 0].sum(),
    "the vocabulary in front": lambda x: F.cross_entropy(x.transpose(1, 2), TARGET),
    "weighed classes": lambda x: F.cross_entropy(x.flatten(0, 1), TARGET.flatten(), weight=WEIGHT),
    "a distribution as target": lambda x: F.cross_entropy(x[0], LOGITS[1].softmax(-1)),
    "two of them": lambda x: (x * x).sum(),
    "on the right of a product": lambda x: (LOGITS * x).sum(),
    "another width": lambda x: x.view(2, -1).square().sum(),
    "read twice": lambda x: x.exp().sum() + F.cross_entropy(x.flatten(0, 1), TARGET.flatten()),
    "written into": lambda x: x.mul_(2.0).square().sum() if not x.is_leaf else (x * 1.0).mul_(2.0).square().sum(),
}


@pytest.mark.parametrize("code", JOINED.values(), ids=JOINED)
def test_everything_else_joins_them_and_is_as_right(code: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert_equal(code, joins=True)


def test_parts_are_joined_once() -> None:
    part = spread(-1, V, 2)

    def work(threads: ThreadGroup) -> list[int]:
        group = Counted(threads)
        logits = DividedLogits(cut(LOGITS, part, group.rank), part, group)
        assert torch.equal(logits.argmax(-1), LOGITS.argmax(-1))
        assert torch.equal(logits.exp(), LOGITS.exp())
        assert whole_of(logits) is whole_of(logits)
        return group.sizes

    assert on_threads(2, work) == [[LOGITS.numel()]] * 2


def test_a_write_that_a_view_would_not_see_is_refused() -> None:
    part = spread(-1, V, 2)

    def work(group: ThreadGroup) -> Any:
        logits = DividedLogits(cut(LOGITS, part, group.rank), part, group)
        rows = logits.view(-1, V)
        for written in (logits, rows):
            with pytest.raises(DataflowError, match="writes into logits that are divided among shards"):
                written.mul_(2.0)
        return repr(logits)

    assert on_threads(2, work)[1] == "DividedLogits(shape=(2, 5, 7), shard 1 of 2)"


def test_autocast_makes_the_loss_float32_as_in_torch() -> None:
    logits, part = LOGITS.flatten(0, 1).bfloat16(), spread(-1, V, 2)

    def work(group: ThreadGroup) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            divided = DividedLogits(cut(logits, part, group.rank), part, group)
            loss, expected = (F.cross_entropy(each, TARGET.flatten()) for each in (divided, logits))
        assert loss.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(loss, expected)

    on_threads(2, work)


def test_a_head_may_leave_its_output_divided() -> None:
    part = spread(0, V, 2)
    plan = UnitPlan(copies=("",), joins={"": spread(-1, V, 2)}, slices={"weight": part, "bias": part})
    head = nn.Linear(3, V).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)

    def work(threads: ThreadGroup) -> None:
        group, own, given = Counted(threads), copy.deepcopy(head), x.clone().requires_grad_(True)
        shard_unit(own, plan, group, keep_logits=Reads())
        logits = own(given)
        assert isinstance(logits, DividedLogits)
        loss = F.cross_entropy(logits.view(-1, V), TARGET.view(-1))
        assert max(group.sizes) == 2 * TARGET.numel()  # sums of a token; no logits
        loss.backward()
        leaf = x.clone().requires_grad_(True)
        expected = F.cross_entropy(head(leaf).view(-1, V), TARGET.view(-1))
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(given.grad, torch.autograd.grad(expected, leaf)[0])

    on_threads(2, work)
