"""What waits on the host comes back as it was, and meanwhile the rank does not hold it."""

from __future__ import annotations

import pytest
import torch
from models import make

from one_step import Blocks, assert_same, kept_bytes, plain, run
from shardwise.execute.host_memory import ScratchFile
from shardwise.execute.offload import Shelf
from shardwise.layout import Layout
from shardwise.plan.sources import OffloadedSource, source_of
from shardwise.schedule import check
from shardwise.schedule.transfers import with_transfers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_tensor_comes_back_from_the_file(dtype: torch.dtype) -> None:
    file = ScratchFile()
    tensor = (torch.arange(24).view(4, 6) % 5).to(dtype)
    away = [file.put(tensor), file.put(tensor.t()), file.put(tensor[:, 1:3]), file.put(tensor[:0])]
    back = [each.tensor() for each in away]
    for made, expected in zip(back, (tensor, tensor.t(), tensor[:, 1:3], tensor[:0]), strict=True):
        assert torch.equal(made, expected)
    assert back[1].stride() == tensor.t().stride()  # products of other strides would round differently
    file.close()


def test_room_that_is_free_is_used_again() -> None:
    file = ScratchFile()
    for step in range(5):
        away = [file.put(torch.full((10,), float(step + each))) for each in range(3)]
        assert [float(each.tensor()[0]) for each in away] == [step, step + 1.0, step + 2.0]
        forgotten = file.put(torch.zeros(10))
        del forgotten
    assert file.written_bytes == 5 * 4 * 40
    assert file._end == 3 * 40
    file.close()


def test_a_tensor_that_is_saved_often_moves_once() -> None:
    file, shelf = ScratchFile(), Shelf(frozenset, least_bytes=0)
    x = torch.randn(8, 8, requires_grad=True)
    y = x * 2
    with shelf.keeping():
        z = (y * y).sum() + (y.exp() * y).sum()
    shelf.put(file)
    assert file.written_bytes == 2 * y.numel() * 4  # y, and what exp returned
    (gradient,) = torch.autograd.grad(z, x)
    torch.testing.assert_close(gradient, 2 * (2 * y + y.exp() * (1 + y)))
    file.close()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_blocks_have_the_bits_of_those_that_keep_everything(recompute: str) -> None:
    assert_same(run(Blocks(), recompute, offload="activations"), run(Blocks(), "none"))


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_models_have_the_gradients_of_plain_ones(name: str) -> None:
    example = make(name)
    ran = run(example.model, "none", batch=example.batch, loss=example.loss, offload="activations")
    assert_same(ran, plain(name))


def test_the_rank_holds_a_fraction_of_what_it_would() -> None:
    assert kept_bytes("none", "activations") < 0.35 * kept_bytes("none")


def test_pipelines_move_what_waits_long_and_keep_the_rest() -> None:
    source = source_of(Layout(pp=2))
    assert source is not None
    schedule = OffloadedSource(source=source)(4)
    check(schedule)
    with_transfers(schedule, {(0, 1)})
    assert schedule.text_rows()[0] == "0F0 0F1 0O1 0B0 0L1 0F2 0O2 0B1 0L2 0F3 0B2 0B3"
    assert "O" not in schedule.text_rows()[1]  # 1F1B: its backward follows at once
