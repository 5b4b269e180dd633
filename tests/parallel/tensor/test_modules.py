"""Parallel layers equal torch's: values at the start, outputs, gradients; on any number of ranks, for odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

import shardwise as sw
from shardwise.describe.tensor import Slice
from shardwise.errors import DataflowError, LayoutError
from shardwise.launch import RankContext
from shardwise.parallel.tensor.modules import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from shardwise.parallel.tensor.slices import cut
from shardwise.parallel.tensor.threads import ThreadGroup, on_threads
from shardwise.testing import on_ranks

F64 = torch.float64
X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
IDS = torch.tensor([[0, 10, 3, 4], [3, 3, 9, 1]])
Make = Callable[..., nn.Module]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def torch_layer(kind: type[nn.Module], *sizes: int, **settings: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return kind(*sizes, dtype=F64, **settings)


def assert_equal(whole: nn.Module, given: torch.Tensor, tp: int, make: Callable[[ThreadGroup], nn.Module]) -> None:
    """Output, gradient of the input, local values and local gradients of a layer that returns whole outputs."""
    leaf = given.clone().requires_grad_(given.is_floating_point())
    expected = whole(leaf)
    expected.sin().sum().backward()

    def work(group: ThreadGroup) -> None:
        layer = make(group)
        own = given.clone().requires_grad_(given.is_floating_point())
        out = layer(own)
        out.sin().sum().backward()
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(own.grad, leaf.grad, rtol=1e-12, atol=1e-13)
        for name, parameter in whole.named_parameters():
            local = layer.get_parameter(name)
            part = layer.part if local.shape != parameter.shape else None
            assert parameter.grad is not None
            for mine, all_of_it in ((local.detach(), parameter.detach()), (local.grad, parameter.grad)):
                wanted = all_of_it if part is None else cut(all_of_it, part, group.rank)
                torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-13)

    on_threads(tp, work)


@pytest.mark.parametrize("tp", [1, 2, 4, 7])
@pytest.mark.parametrize("bias", [True, False])
def test_columns_that_are_gathered(tp: int, bias: bool) -> None:
    def make(group: ThreadGroup) -> nn.Module:
        return ColumnParallelLinear(6, 7, group=group, bias=bias, gather_output=True, generator=seeded(), dtype=F64)

    assert_equal(torch_layer(nn.Linear, 6, 7, bias=bias), X, tp, make)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_rows_of_a_whole_input(tp: int, bias: bool) -> None:
    def make(group: ThreadGroup) -> nn.Module:
        return RowParallelLinear(6, 5, group=group, bias=bias, input_is_divided=False, generator=seeded(), dtype=F64)

    assert_equal(torch_layer(nn.Linear, 6, 5, bias=bias), X, tp, make)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("padding", [None, 3, -2])
def test_an_odd_vocabulary_with_a_row_of_padding(tp: int, padding: int | None) -> None:
    def make(group: ThreadGroup) -> nn.Module:
        return VocabParallelEmbedding(11, 6, padding, group=group, generator=seeded(), dtype=F64)

    assert_equal(torch_layer(nn.Embedding, 11, 6, padding_idx=padding), IDS, tp, make)


class Mlp(nn.Module):
    """An MLP of seven hidden features, whole or divided."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("tp", [2, 3])
def test_columns_then_rows_meet_once_a_pass(tp: int) -> None:
    generator = seeded()
    values = [torch.randn(shape, generator=generator, dtype=F64) for shape in ((7, 6), (7,), (6, 7), (6,))]
    whole = Mlp(nn.Linear(6, 7, dtype=F64), nn.Linear(7, 6, dtype=F64))
    nn.utils.vector_to_parameters(torch.cat([value.flatten() for value in values]), whole.parameters())
    leaf = X.clone().requires_grad_(True)
    expected = whole(leaf)
    expected.sin().sum().backward()

    def work(group: ThreadGroup) -> None:
        mlp = Mlp(ColumnParallelLinear(6, 7, group=group, dtype=F64), RowParallelLinear(7, 6, group=group, dtype=F64))
        with torch.no_grad():
            for parameter, value, part in zip(
                mlp.parameters(), values, (mlp.up.part, mlp.up.part, mlp.down.part, None), strict=True
            ):
                parameter.copy_(value if part is None else cut(value, part, group.rank))
        own = X.clone().requires_grad_(True)
        out = mlp(own)
        out.sin().sum().backward()
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(own.grad, leaf.grad)
        assert whole.down.weight.grad is not None
        torch.testing.assert_close(mlp.down.weight.grad, cut(whole.down.weight.grad, mlp.down.part, group.rank))
        torch.testing.assert_close(mlp.down.bias.grad, whole.down.bias.grad)

    on_threads(tp, work)


def test_packed_projections_have_a_run_of_each_part() -> None:
    part = Slice.even(0, 6, 2, parts=(2, 4))  # [a|b]

    def work(group: ThreadGroup) -> torch.Tensor:
        return ColumnParallelLinear(6, 6, group=group, part=part, generator=seeded(), dtype=F64).weight.detach()

    whole = torch_layer(nn.Linear, 6, 6).get_parameter("weight")
    first, second = on_threads(2, work)
    assert torch.equal(first, whole[[0, 2, 3]])
    assert torch.equal(second, whole[[1, 4, 5]])


def test_an_id_outside_of_the_table_fails_as_in_torch() -> None:
    def work(group: ThreadGroup) -> None:
        table = VocabParallelEmbedding(5, 2, group=group)
        for wrong in (5, -1):
            with pytest.raises(IndexError, match="out of range"):
                table(torch.tensor([0, wrong]))

    on_threads(2, work)


def test_a_part_of_another_size_is_refused() -> None:
    with pytest.raises(LayoutError, match="a layer of 8 features on 2 ranks.*the part divides 6 among 2"):
        on_threads(2, lambda group: ColumnParallelLinear(4, 8, group=group, part=Slice.even(0, 6, 2)))


def test_fewer_ids_or_features_than_ranks_are_refused() -> None:
    with pytest.raises(LayoutError, match="some of its ids, and 3 are fewer than 4 ranks"):
        on_threads(4, lambda group: VocabParallelEmbedding(3, 2, group=group))
    with pytest.raises(LayoutError, match="some of its features, and 1 are fewer than 2 ranks"):
        on_threads(2, lambda group: RowParallelLinear(1, 4, group=group))


@pytest.mark.parametrize(("divided", "width"), [(True, 6), (False, 3)])
def test_rows_refuse_an_input_that_is_not_divided_as_they_were_told(divided: bool, width: int) -> None:
    def work(group: ThreadGroup) -> None:
        layer = RowParallelLinear(6, 4, group=group, input_is_divided=divided)
        with pytest.raises(DataflowError, match=f"but these are {width}; say input_is_divided={not divided}"):
            layer(torch.randn(2, width))

    on_threads(2, work)


class Reader(nn.Module):
    """Embedding, one layer, head; the loss of a vocabulary of eleven."""

    def __init__(self, group: sw.TensorGroup) -> None:
        super().__init__()
        self.group = group
        self.embed = sw.VocabParallelEmbedding(11, 6, group=group, generator=seeded(), dtype=F64)
        self.head = sw.ColumnParallelLinear(6, 11, group=group, generator=seeded(), dtype=F64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return sw.vocab_parallel_cross_entropy(self.head(self.embed(ids)), ids, vocabulary=11, group=self.group)


@on_ranks(2)
def test_a_model_of_the_public_names_on_processes(rank: RankContext) -> None:
    process_group = dist.new_group([0, 1])
    reader = Reader(sw.ProcessTensorGroup(process_group))
    loss = reader(IDS)
    loss.backward()
    embed, head = torch_layer(nn.Embedding, 11, 6), torch_layer(nn.Linear, 6, 11)
    expected = nn.functional.cross_entropy(head(embed(IDS)).flatten(0, 1), IDS.flatten())
    expected.backward()

    torch.testing.assert_close(loss, expected)
    for mine, whole in ((reader.embed, embed), (reader.head, head)):
        torch.testing.assert_close(mine.weight.grad, cut(whole.get_parameter("weight").grad, mine.part, rank.rank))
    dist.destroy_process_group(process_group)


@on_ranks(2)
@pytest.mark.parametrize("columns", [True, False])
def test_a_layer_by_itself_on_processes_forward_and_backward(rank: RankContext, columns: bool) -> None:
    process_group = dist.new_group([0, 1])
    group = sw.ProcessTensorGroup(process_group)
    own, leaf = X.clone().requires_grad_(True), X.clone().requires_grad_(True)
    if columns:  # x·[W1 W2], all-gather; three and four of seven columns
        layer: nn.Module = sw.ColumnParallelLinear(6, 7, group=group, gather_output=True, generator=seeded(), dtype=F64)
        given, read, whole = own, leaf, torch_layer(nn.Linear, 6, 7)
    else:  # x1·W1 + x2·W2, all-reduce; two and three of five columns
        layer = sw.RowParallelLinear(5, 7, group=group, input_is_divided=False, generator=seeded(), dtype=F64)
        given, read, whole = own[..., 1:], leaf[..., 1:], torch_layer(nn.Linear, 5, 7)
    out, expected = layer(given), whole(read)
    out.sin().sum().backward()
    expected.sin().sum().backward()

    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(own.grad, leaf.grad, rtol=1e-12, atol=1e-13)
    for name, parameter in whole.named_parameters():
        assert parameter.grad is not None
        local = layer.get_parameter(name).grad
        assert local is not None
        wanted = parameter.grad if local.shape == parameter.shape else cut(parameter.grad, layer.part, rank.rank)
        torch.testing.assert_close(local, wanted, rtol=1e-12, atol=1e-13)
    dist.destroy_process_group(process_group)


@on_ranks(2)
def test_the_example_of_the_docs_runs(rank: RankContext) -> None:
    text = (Path(__file__).parents[3] / "docs" / "parallel-layers.md").read_text()
    example = text.split("```python\n")[1].split("```")[0]
    sizes = "WORDS, WIDTH = 50257, 768\n"
    assert sizes in example
    names: dict[str, Any] = {}
    exec(example.replace(sizes, "WORDS, WIDTH = 53, 8\n"), names)
    ids = torch.randint(0, 53, (2, 5), generator=seeded())
    reader = names["Reader"]()
    loss = reader(ids, ids)
    loss.backward()

    assert 0 < float(loss.detach()) < 20
    assert all(parameter.grad is not None for parameter in reader.parameters())
    dist.destroy_process_group(names["ranks"])
