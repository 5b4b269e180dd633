"""A backward in two halves has the gradients of a whole one, for every layer that is known, whatever is around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from shardwise.errors import DataflowError
from shardwise.execute.deferred import Deferred
from shardwise.execute.layer_forwards import OwnProducts
from shardwise.execute.layer_products import LayerProducts, Linear
from shardwise.execute.weight_sums import WeightSums
from shardwise.parallel.tensor.modules import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from shardwise.parallel.tensor.threads import ThreadGroup, on_threads

EXACT = 1e-12  # float64: the same products, sums in another order

Forward = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Own(OwnProducts):
    """A user's layer that says what its products are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6))

    def layer_products(self) -> LayerProducts:
        return Linear()

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, self.weight, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x).tanh()


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 3), (2, 5, 6)),
    "linear without bias": (lambda: nn.Linear(6, 3, bias=False), (4, 6)),
    "gpt-2's linear": (lambda: Conv1D(3, 6), (2, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, dilation=2, bias=False), (2, 4, 9, 8)),
    "conv2d, same size": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 5, 6)),
    "conv2d, uneven padding": (lambda: nn.Conv2d(4, 6, 2, padding="same"), (2, 4, 5, 6)),
    "conv2d, around": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 6)),
    "conv2d of one sample": (lambda: nn.Conv2d(4, 6, 3), (4, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 3)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 3)),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(2, 2, 2, bias=False), (2, 2, 3, 3, 2)),
    "own": (Own, (2, 6)),
}
PUT_OFF_WHOLE = {"conv2d, uneven padding", "conv2d of one sample"}


def made(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return nn.ModuleDict({"unit": layer.double()})


def gradients_of(
    model: nn.Module, batches: list[torch.Tensor], forward: Forward, *, split: bool, watch: bool
) -> tuple[dict[str, torch.Tensor | None], list[torch.Tensor | None], list[int]]:
    """Of parameters and inputs; all I run before all W, and the last W first. And the length of each queue."""
    sums = WeightSums()
    sums.install(model, ["unit"], dict(model.named_parameters()))
    if watch:
        sums.watch("unit", model["unit"])
    queues: list[Deferred] = []
    xs = [batch.detach().clone() for batch in batches]
    with sums.running(sums=False, splits=split):
        for x in xs:
            x.requires_grad_(x.is_floating_point())
            loss = forward(model, x)
            queues.append(Deferred())
            if split:
                with sums.deferring(queues[-1]):
                    loss.backward()
            else:
                loss.backward()
        lengths = [len(queue) for queue in queues]
        for queue in reversed(queues):
            queue.run()
    sums.unwatch()
    sums.close()
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found, [x.grad for x in xs], lengths


def assert_split(
    model: nn.Module,
    batches: list[torch.Tensor],
    forward: Forward,
    *,
    waiting: int | None,
    watch: bool = False,
    tolerance: float = EXACT,
) -> None:
    """Both halves make the whole, and so many products have waited for W in each micro-batch."""
    wanted, wanted_x, _ = gradients_of(model, batches, forward, split=False, watch=False)
    got, got_x, lengths = gradients_of(model, batches, forward, split=True, watch=watch)
    for name, gradient in wanted.items():
        if gradient is None:
            assert got[name] is None, name
        else:
            torch.testing.assert_close(got[name], gradient, rtol=tolerance, atol=tolerance)
    for mine, other in zip(got_x, wanted_x, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
    if waiting is not None:
        assert lengths == [waiting] * len(batches)


def numbers(*shape: int, count: int = 3) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(count)]


def squares(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model["unit"](x).square().sum()


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_the_halves_of_a_layer_are_the_whole(name: str) -> None:
    make, shape = LAYERS[name]
    assert_split(made(make()), numbers(*shape), squares, waiting=0 if name in PUT_OFF_WHOLE else 1)


@pytest.mark.parametrize("padding", [None, 2])
def test_the_halves_of_an_embedding_are_the_whole(padding: int | None) -> None:
    ids = [torch.tensor([[0, 2, 2], [4, 1, 2]]), torch.tensor([[3, 3, 3]])]
    assert_split(made(nn.Embedding(5, 4, padding_idx=padding)), ids, squares, waiting=1)


class Tricks(nn.Module):
    """One weight read twice, by two layers that share it, and in plain code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(torch.tanh(self.first(x)))
        return self.second(x) @ self.first.weight + self.first.weight.sum(0)


def test_a_weight_that_is_read_often_gets_the_gradients_of_all_readers() -> None:
    assert_split(made(Tricks()), numbers(2, 6), squares, waiting=3)


def test_a_frozen_weight_waits_for_nothing_and_a_frozen_bias_has_no_gradient() -> None:
    model = made(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    model["unit"][0].weight.requires_grad_(False)
    model["unit"][1].bias.requires_grad_(False)
    assert_split(model, numbers(2, 6), squares, waiting=1)


def test_an_input_without_gradient_is_given_none() -> None:
    model = made(nn.Linear(6, 3))
    assert_split(model, numbers(2, 6), lambda m, x: m["unit"](x.detach()).square().sum(), waiting=1)


def test_hooks_of_the_user_get_every_gradient_at_once() -> None:
    model = made(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    seen: list[torch.Tensor] = []
    model["unit"][0].weight.register_hook(seen.append)
    assert_split(model, numbers(2, 6), squares, waiting=1)
    assert len(seen) == 6


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_inside_a_unit_is_split(reentrant: bool) -> None:
    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        unit = model["unit"]
        y = checkpoint(lambda t: torch.tanh(unit[0](t)), x, use_reentrant=reentrant)
        return unit[1](y).square().sum()

    assert_split(made(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))), numbers(2, 6), forward, waiting=2)


class Divided(nn.Module):
    """This rank's part of a table, of columns and of rows."""

    def __init__(self, group: ThreadGroup) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.embed = VocabParallelEmbedding(7, 6, padding_idx=3, group=group, generator=random)
        self.up = ColumnParallelLinear(6, 8, group=group, generator=random)
        self.whole = ColumnParallelLinear(6, 8, group=group, gather_output=True, generator=random)
        self.down = RowParallelLinear(8, 6, group=group, generator=random)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return torch.tanh(self.down(torch.tanh(self.up(x)))) + self.whole(x)[..., :6]


def test_the_halves_of_divided_layers_are_the_whole() -> None:
    ids = [torch.tensor([[0, 2, 3], [6, 5, 2]]), torch.tensor([[3, 3, 4]])]

    def work(group: ThreadGroup) -> None:
        model = nn.ModuleDict({"unit": Divided(group).double()})
        assert_split(model, ids, squares, waiting=4)

    on_threads(2, work)


class InCode(nn.Module):
    """Products that no layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
        self.stack = nn.Parameter(torch.randn(3, 6, 6))


PRODUCTS: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], int]] = {
    "F.linear": (lambda m, x: F.linear(x, m.a, m.bias), 1),
    "F.linear of named arguments": (lambda m, x: F.linear(input=x, weight=m.a), 1),
    "one of a stack": (lambda m, x: F.linear(x, m.stack[2], m.bias) + F.linear(x, m.stack[0]), 2),
    "matmul": (lambda m, x: x @ m.a.t() + torch.matmul(x, m.a) + x.mm(m.a[:, :3]).repeat(1, 2), 3),
    "addmm": (lambda m, x: torch.addmm(m.bias, x, m.a), 1),
    "batched": (lambda m, x: torch.bmm(x.view(1, -1, 6).expand(3, -1, 6), m.stack), 1),
    "batched, transposed": (lambda m, x: x.expand(3, *x.shape) @ m.stack.transpose(1, 2), 1),
    "two weights": (lambda m, x: x * (m.a @ m.a.t()).sum(), 1),
    "a vector": (lambda m, x: x @ m.bias, 0),
    "expanded": (lambda m, x: x @ m.bias[:, None].expand(6, 4), 0),
    "computed": (lambda m, x: x @ m.a.exp(), 0),
    "no weight": (lambda m, x: x @ x.t(), 0),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_in_plain_code_are_put_off_where_they_are_watched(name: str) -> None:
    body, waiting = PRODUCTS[name]
    model = made(InCode())
    model["unit"].forward = lambda x: body(model["unit"], x)
    assert_split(model, numbers(4, 6), squares, waiting=waiting, watch=True)
    assert_split(model, numbers(4, 6), squares, waiting=0)


def test_a_table_in_plain_code_is_put_off_where_it_is_watched() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 6))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return F.linear(F.embedding(ids, self.table, padding_idx=-1), self.table)

    ids = [torch.tensor([[0, 2, 2], [4, 1, 2]]), torch.tensor([[3, 3, 4]])]
    assert_split(made(Table()), ids, squares, waiting=2, watch=True)


@pytest.mark.parametrize("across", [False, True])
def test_the_projections_of_torchs_attention_are_put_off_where_they_are_watched(across: bool) -> None:
    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        other = x.cos() if across else x
        return model["unit"](x, other, other, need_weights=False)[0].square().sum()

    model = made(nn.MultiheadAttention(8, 2, batch_first=True))
    assert_split(model, numbers(2, 3, 8), forward, waiting=4 if across else 2, watch=True)


def test_grouped_products_are_put_off_where_they_are_watched() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.randn(3, 8, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            offs = torch.tensor([2, 2, 7], dtype=torch.int32)
            y = F.grouped_mm(x, self.stack.transpose(-2, -1), offs=offs)  # (rows, 8)
            return F.grouped_mm(torch.tanh(y), self.stack, offs=offs)

    torch.manual_seed(0)
    model = nn.ModuleDict({"unit": Experts()})
    assert_split(model, [x.float() for x in numbers(7, 4)], squares, waiting=2, watch=True, tolerance=1e-5)


class AsksForAGradient(torch.autograd.Function):
    """Its backward asks for a gradient of its own, which is no gradient of a weight (an implicit layer, say)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return torch.tanh(layer(x))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            (dx,) = torch.autograd.grad(torch.tanh(ctx.layer(inner)), inner, gradients[0])
        return dx, None


def test_a_gradient_that_a_backward_asks_for_itself_adds_to_no_weight() -> None:
    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return AsksForAGradient.apply(model["unit"][1](x), model["unit"][0]).square().sum()

    model = made(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    assert_split(model, numbers(2, 6), forward, waiting=1)


def test_a_backward_of_a_backward_is_torchs_own() -> None:
    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(model["unit"](x))
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return dx.square().sum() + y.square().sum()

    for name in ("linear", "gpt-2's linear", "conv2d", "transposed conv1d"):
        make, shape = LAYERS[name]
        assert_split(made(make()), numbers(*shape), forward, waiting=None)


def test_what_torch_transforms_and_compiles_is_torchs_own() -> None:
    model = made(nn.Linear(6, 3))
    assert_split(
        model,
        numbers(2, 6),
        lambda m, x: torch.func.vmap(lambda row: m["unit"](row))(x).square().sum(),
        waiting=0,
    )


class Rounded(nn.Module):
    """Layers that autocast rounds, and one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear, self.out = nn.Embedding(5, 8), nn.Linear(8, 8), Conv1D(4, 8)
        self.conv, self.matrix = nn.Conv1d(4, 6, 3, padding=1), nn.Parameter(torch.randn(6, 6))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.out(torch.tanh(self.linear(self.embed(ids))))  # (batch, tokens, 4)
        return self.conv(x.transpose(1, 2)).transpose(1, 2) @ self.matrix


def test_under_autocast_weights_wait_for_the_gradients_that_autocast_computes() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"unit": Rounded()})
    ids = [torch.tensor([[0, 2, 2], [4, 1, 2]]), torch.tensor([[3, 3, 3]])]

    def forward(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model["unit"](ids)
            assert y.dtype == torch.bfloat16
            return y.float().square().sum()

    assert_split(model, ids, forward, waiting=5, watch=True, tolerance=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_unit_is_torchs_own() -> None:
    model = made(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    compiled = torch.compile(model["unit"], backend="eager")
    assert_split(model, numbers(2, 6), lambda m, x: compiled(x).square().sum(), waiting=0)


class Sine(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin()


def test_the_queue_keeps_inputs_and_output_gradients_alone_and_frees_them_layer_by_layer() -> None:
    model = made(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)))
    sums, queue = WeightSums(), Deferred()
    sums.install(model, ["unit"], dict(model.named_parameters()))
    x = numbers(32, 64, count=1)[0].requires_grad_()
    sines: list[StorageWeakRef] = []
    model["unit"][1] = Sine()  # keeps its input, which no linear layer does
    model["unit"][1].register_forward_hook(lambda _, args, out: sines.append(StorageWeakRef(args[0].untyped_storage())))
    with sums.running(sums=False, splits=True):
        y = model["unit"](x)
        assert not sines[0].expired()
        with sums.deferring(queue):
            y.sum().backward()
        assert sines[0].expired()  # the graph is free
        one = 32 * 64 * 8
        assert queue.nbytes <= 6 * one  # of each layer x and dy
        assert queue.nbytes >= 5 * one  # the last dy may be one number, expanded
        left: list[int] = []
        queue.run(lambda parameter: left.append(queue.nbytes))
    assert left[0] > left[2] > left[4] == 0
    sums.close()


def test_layers_that_read_one_input_keep_it_once() -> None:
    model = made(nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(3)]))
    sums, queue = WeightSums(), Deferred()
    sums.install(model, ["unit"], dict(model.named_parameters()))
    with sums.running(sums=False, splits=True):
        x = numbers(32, 64, count=1)[0]
        loss = sum(layer(x).square().sum() for layer in model["unit"])
        with sums.deferring(queue):
            loss.backward()
    assert queue.nbytes == (1 + 3) * 32 * 64 * 8
    queue.run()
    sums.close()


def test_parameters_are_told_when_nothing_of_them_waits() -> None:
    model = made(Tricks())
    sums, queue, told = WeightSums(), Deferred(), []
    sums.install(model, ["unit"], dict(model.named_parameters()))
    with sums.running(sums=False, splits=True), sums.deferring(queue):
        squares(model, numbers(2, 6, count=1)[0]).backward()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[each] for each in queue.parameters} == set(names.values())
    queue.run(lambda parameter: told.append(names[id(parameter)]))
    assert sorted(told) == sorted(names.values())
    assert told[0] == "unit.second.bias"  # the last layer first; the weight is read by earlier ones too
    assert told[-1] in ("unit.first.bias", "unit.first.weight")
    sums.close()


def test_a_tensor_that_was_written_into_between_the_halves_is_an_error() -> None:
    model = made(nn.Linear(6, 3))
    sums, queue = WeightSums(), Deferred()
    sums.install(model, ["unit"], dict(model.named_parameters()))
    x = numbers(2, 6, count=1)[0]
    with sums.running(sums=False, splits=True), sums.deferring(queue):
        squares(model, x).backward()
    x.mul_(2.0)
    with pytest.raises(DataflowError, match=r"stays as it was between I and W.*weight \(3, 6\)"):
        queue.run()
    sums.close()


def test_units_that_are_kept_whole_leave_nothing_for_later() -> None:
    model = made(nn.Linear(6, 3))
    sums, queue = WeightSums(), Deferred()
    sums.install(model, ["unit"], dict(model.named_parameters()))
    sums.keep_whole(["unit"])
    with sums.running(sums=False, splits=True), sums.deferring(queue):
        squares(model, numbers(2, 6, count=1)[0]).backward()
    assert len(queue) == 0
    assert model["unit"].weight.grad is not None
    sums.close()
