"""BatchNorm on replicas: running statistics of one device, and micro-batches that are normalised together."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from shardwise.parallel.batch_statistics import RunningStatistics, SynchronisedStatistics, batch_norms

MICRO_BATCHES, REPLICAS = 3, 2


class Threads:
    """Replicas as threads of this process, which sum in the order of their ranks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=20)
        self.given: dict[int, torch.Tensor] = {}

    def of(self, rank: int) -> Replica:
        return Replica(self, rank)


class Replica:
    def __init__(self, all_of_them: Threads, rank: int) -> None:
        self.all, self.rank, self.size = all_of_them, rank, all_of_them.size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.all.given[self.rank] = tensor.clone()
        self.all.barrier.wait()
        total = sum(self.all.given[rank] for rank in range(self.size))
        self.all.barrier.wait()
        return tensor.copy_(total)


def on_replicas(work: Callable[[Replica], object], size: int = REPLICAS) -> list[object]:
    """What every replica returned."""
    group, found = Threads(size), [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = work(group.of(rank))
        except BaseException:
            group.barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def model(momentum: float | None = 0.1) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.Conv2d(4, 2, 1))
    return made.append(nn.BatchNorm2d(2, momentum=momentum)).double()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def statistics(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


def equal(found: object, wanted: dict[str, torch.Tensor]) -> bool:
    assert isinstance(found, dict)
    return all(torch.allclose(found[name].double(), wanted[name].double(), rtol=1e-12, atol=1e-12) for name in wanted)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_statistics_of_every_replica_are_those_of_one_device(momentum: float | None) -> None:
    one, steps = model(momentum), 2
    nets = [model(momentum) for _ in range(REPLICAS)]
    parts = images(4 * MICRO_BATCHES * REPLICAS * steps).split(4)
    for part in parts:
        one(part)

    def work(replica: Replica) -> dict[str, torch.Tensor]:
        net = nets[replica.rank]
        kept = RunningStatistics(batch_norms(net), replica)
        for step in range(steps):
            first = (step * REPLICAS + replica.rank) * MICRO_BATCHES
            with kept.step():
                for part in parts[first : first + MICRO_BATCHES]:
                    net(part)
        return statistics(net)

    for found in on_replicas(work):
        assert equal(found, statistics(one))


def test_without_the_sum_replicas_differ() -> None:
    parts = images(8 * MICRO_BATCHES).split(4)
    nets = [model(), model()]
    for net, part in zip(nets, parts, strict=False):
        net(part)
    assert not equal(statistics(nets[0]), statistics(nets[1]))


def test_evaluation_exchanges_nothing() -> None:
    nets = [model(), model()]

    def work(replica: Replica) -> bool:
        net = nets[replica.rank].eval()
        before = statistics(net)
        with RunningStatistics(batch_norms(net), replica).step():
            net(images(4))
        return equal(statistics(net), before)

    assert on_replicas(work) == [True, True]


@pytest.mark.parametrize("sizes", [(4, 4), (1, 7)])
def test_synchronised_replicas_have_outputs_gradients_and_statistics_of_one_device(sizes: tuple[int, int]) -> None:
    batch = images(sum(sizes))
    goal = torch.randn(sum(sizes), 2, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    one, nets = model(), [model(), model()]
    whole = batch.clone().requires_grad_()
    made = one(whole)
    (made * goal).sum().backward()
    wanted = {name: p.grad for name, p in one.named_parameters()}

    def work(replica: Replica) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        net = nets[replica.rank]
        own = batch.split(sizes)[replica.rank].clone().requires_grad_()
        together = SynchronisedStatistics(batch_norms(net), replica)
        with together.step():
            out = net(own)
            (out * goal.split(sizes)[replica.rank]).sum().backward()
        together.close()
        assert "forward" not in net[1].__dict__
        assert own.grad is not None
        return (
            out.detach(),
            own.grad,
            {n: p.grad for n, p in net.named_parameters() if p.grad is not None},
            statistics(net),
        )

    found = on_replicas(work)
    outs, inputs, gradients, buffers = zip(*found, strict=True)  # type: ignore[arg-type]
    assert torch.allclose(torch.cat(outs), made, rtol=1e-12, atol=1e-12)
    assert whole.grad is not None
    assert torch.allclose(torch.cat(inputs), whole.grad, rtol=1e-10, atol=1e-12)
    for name, gradient in wanted.items():
        assert gradient is not None
        assert torch.allclose(sum(each[name] for each in gradients), gradient, rtol=1e-10, atol=1e-12), name
    assert all(equal(each, statistics(one)) for each in buffers)


def test_outside_of_a_step_a_synchronised_norm_is_the_usual_one() -> None:
    nets = [model(), model()]

    def work(replica: Replica) -> torch.Tensor:
        net = nets[replica.rank]
        SynchronisedStatistics(batch_norms(net), replica)
        out: torch.Tensor = net(images(4 + replica.rank))
        return out.detach()

    for found, count in zip(on_replicas(work), (4, 5), strict=True):
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, model()(images(count)))
