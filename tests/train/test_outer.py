"""Exchanges between workers give what the formula of each rule says. Workers are threads, their steps arithmetic."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from shardwise.comm.compress.make import compressing
from shardwise.comm.outside import OutsideCollective
from shardwise.layout import Communication
from shardwise.parallel.states import State
from shardwise.train.asynchronous.delayed import DelayedAveraging
from shardwise.train.asynchronous.diloco import DiLoCo
from shardwise.train.asynchronous.eager_diloco import EagerDiLoCo
from shardwise.train.asynchronous.fragment import fragments_of
from shardwise.train.asynchronous.local_sgd import LocalSGD
from shardwise.train.asynchronous.note import workers_note
from shardwise.train.asynchronous.outer import Outer
from shardwise.train.asynchronous.outer_sgd import OuterSGD
from shardwise.train.asynchronous.rule import Rule
from shardwise.train.run_file import run_from

WORKERS, STEPS, EVERY = 3, 9, 3
RATE, MOMENTUM = 0.7, 0.9
SHAPES = {"a": (5, 3), "b": (4,), "c": (2, 2)}  # 23 elements: no multiple of the workers

# Some dozens of float64 additions.
EXACT = 1e-13

OUTER = OuterSGD(rate=RATE, momentum=MOMENTUM, nesterov=True)
Weights = torch.Tensor  # all of them, flat


def begin() -> dict[str, State]:
    generator = torch.Generator().manual_seed(3)
    made = {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in SHAPES.items()}
    return {n: State(parameter=nn.Parameter(value), shape=SHAPES[n]) for n, value in made.items()}


def inner(weights: Weights, worker: int, step: int) -> Weights:
    """What a worker's optimizer makes of its weights in a step."""
    return weights - 0.1 * (weights - worker - 0.3 * step).tanh()


def tokens_of(worker: int, step: int) -> float:
    return 1.0 + worker + step % 2


def flat(states: dict[str, State]) -> Weights:
    return torch.cat([state.parameter.detach().reshape(-1) for state in states.values()])


def on_workers(function: Callable[[OutsideCollective], object]) -> list[object]:
    """`function` on each of the workers at once; what they return."""
    store = torch.distributed.HashStore()

    def run(index: int) -> object:
        return function(OutsideCollective(store, "sums", rank=index, size=WORKERS, timeout_s=20))

    with ThreadPoolExecutor(WORKERS) as threads:
        return [each.result(timeout=30) for each in [threads.submit(run, index) for index in range(WORKERS)]]


def exchanged(rule: Rule, *, fragments: int = 1, steps: int = STEPS) -> list[tuple[list[Weights], Weights]]:
    """Of every worker: its weights behind every step, and the averaged ones ahead of the last step."""

    def run(group: OutsideCollective) -> tuple[list[Weights], Weights]:
        states, passed = begin(), []
        outer = Outer(states, rule, group=group, every=EVERY, num_fragments=fragments)
        for step in range(steps):
            if step + 1 == steps:
                with outer.averaged():
                    averaged = flat(states)
                assert torch.equal(flat(states), passed[-1])
            for state in states.values():
                state.parameter.data = inner(state.parameter.data, group.rank, step)
            outer.step_done(step, tokens=tokens_of(group.rank, step), last=step + 1 == steps)
            passed.append(flat(states))
        outer.close()
        return passed, averaged

    return on_workers(run)  # type: ignore[return-value]


def rounds() -> Iterator[tuple[range, list[float]]]:
    """The steps of each round, and what each worker weighs in it."""
    for first in range(0, STEPS, EVERY):
        steps = range(first, first + EVERY)
        tokens = [sum(tokens_of(k, step) for step in steps) for k in range(WORKERS)]
        yield steps, [each / sum(tokens) for each in tokens]


def trained(weights: Weights, worker: int, steps: range) -> Weights:
    for step in steps:
        weights = inner(weights, worker, step)
    return weights


def nesterov(weights: Weights, velocity: Weights, gradient: Weights) -> tuple[Weights, Weights]:
    velocity = MOMENTUM * velocity + gradient
    return weights - RATE * (gradient + MOMENTUM * velocity), velocity


def test_local_sgd_ends_every_round_at_the_mean_of_the_workers_weighed_by_their_tokens() -> None:
    weights = flat(begin())
    wanted = []
    for steps, shares in rounds():
        weights = sum(share * trained(weights, k, steps) for k, share in enumerate(shares))
        wanted.append(weights)
    for passed, averaged in exchanged(LocalSGD()):
        torch.testing.assert_close(torch.stack(passed[EVERY - 1 :: EVERY]), torch.stack(wanted), rtol=0, atol=EXACT)
        torch.testing.assert_close(averaged, wanted[-2], rtol=0, atol=EXACT)


@pytest.mark.parametrize("fragments", [1, 2, 3])
def test_diloco_gives_the_mean_to_an_outer_optimizer(fragments) -> None:
    last = exchanged(DiLoCo(OUTER), fragments=fragments)
    if fragments == 1:
        weights, velocity = flat(begin()), torch.zeros(23, dtype=torch.float64)
        for steps, shares in rounds():
            mean = sum(share * (weights - trained(weights, k, steps)) for k, share in enumerate(shares))
            weights, velocity = nesterov(weights, velocity, mean)
        torch.testing.assert_close(last[0][0][-1], weights, rtol=0, atol=EXACT)
    for passed, _ in last:
        assert torch.equal(passed[-1], last[0][0][-1])  # the same bits on every worker


def test_diloco_is_torchs_sgd_on_what_workers_have_done() -> None:
    states = begin()
    parameters = [state.parameter for state in states.values()]
    torch_outer = torch.optim.SGD(parameters, lr=RATE, momentum=MOMENTUM, nesterov=True)
    for steps, shares in rounds():
        for parameter in parameters:
            start = parameter.detach()
            parameter.grad = sum(share * (start - trained(start, k, steps)) for k, share in enumerate(shares))
        torch_outer.step()
    torch.testing.assert_close(exchanged(DiLoCo(OUTER))[0][0][-1], flat(states), rtol=0, atol=EXACT)


def test_a_fragment_is_exchanged_at_steps_of_its_own() -> None:
    passed = [worker[0] for worker in exchanged(LocalSGD(), fragments=3)]
    sizes = [fragment.num_elements for fragment in fragments_of(begin(), 3)]
    assert sum(sizes) == 23
    for step in range(STEPS - 1):
        parts = [worker[step].split(sizes) for worker in passed]
        alike = [torch.equal(parts[0][i], parts[1][i]) for i in range(3)]
        assert alike == [sizes[i] == 0 or (step + 1 - i) % EVERY == 0 for i in range(3)]


def test_delayed_averaging_replaces_a_workers_progress_by_everybodys_one_round_later() -> None:
    starts = [flat(begin())] * WORKERS
    sent: list[Weights] = []
    means: list[Weights] = []
    wanted = []
    for steps, shares in rounds():
        nows = [trained(start, k, steps) for k, start in enumerate(starts)]
        own = [start - now for start, now in zip(starts, nows, strict=True)]
        starts = [now + sent[k] - means[-1] if means else now for k, now in enumerate(nows)]
        sent, means = own, [*means, sum(share * each for share, each in zip(shares, own, strict=True))]
        wanted.append(starts)
    found = exchanged(DelayedAveraging())
    for k, (passed, averaged) in enumerate(found):
        torch.testing.assert_close(passed[EVERY - 1], wanted[0][k], rtol=0, atol=EXACT)
        torch.testing.assert_close(passed[2 * EVERY - 1], wanted[1][k], rtol=0, atol=EXACT)
        torch.testing.assert_close(averaged, flat(begin()) - means[0] - means[1], rtol=0, atol=EXACT)
        torch.testing.assert_close(passed[-1], flat(begin()) - sum(means), rtol=0, atol=EXACT)


def test_eager_diloco_takes_the_others_progress_one_round_late_and_its_own_as_it_is() -> None:
    nothing = torch.zeros(23, dtype=torch.float64)
    workers = [(flat(begin()), nothing)] * WORKERS
    complete = flat(begin()), nothing
    sent: list[Weights] = []
    mean: Weights | None = None
    for number, (steps, shares) in enumerate(rounds()):
        own = [start - trained(start, k, steps) for k, (start, _) in enumerate(workers)]
        mixed = [each / WORKERS + (0 if mean is None else mean - sent[k] / WORKERS) for k, each in enumerate(own)]
        workers = [nesterov(*worker, gradient) for worker, gradient in zip(workers, mixed, strict=True)]
        sent, mean = own, sum(share * each for share, each in zip(shares, own, strict=True))
        complete = nesterov(*complete, mean)
        if number == 1:
            behind_two_rounds = workers, complete[0]
    for k, (passed, averaged) in enumerate(exchanged(EagerDiLoCo(OUTER, WORKERS))):
        torch.testing.assert_close(passed[2 * EVERY - 1], behind_two_rounds[0][k][0], rtol=0, atol=EXACT)
        torch.testing.assert_close(averaged, behind_two_rounds[1], rtol=0, atol=EXACT)
        torch.testing.assert_close(passed[-1], complete[0], rtol=0, atol=EXACT)


@pytest.mark.parametrize("rule", [DelayedAveraging(), EagerDiLoCo(OUTER, WORKERS)])
def test_a_stale_rule_goes_on_while_another_worker_has_not_come(rule) -> None:
    late, went_on = threading.Event(), threading.Event()

    def run(group: OutsideCollective) -> None:
        states = begin()
        outer = Outer(states, rule, group=group, every=1)
        if group.rank == 0:
            assert late.wait(20)
        outer.step_done(0, tokens=1.0, last=False)
        if group.rank == 1:
            went_on.set()
        if group.rank == 2:
            assert went_on.wait(20)  # while worker 0 has not begun
            late.set()
        outer.step_done(1, tokens=1.0, last=True)
        outer.close()

    on_workers(run)


def test_a_worker_without_tokens_weighs_nothing() -> None:
    def run(group: OutsideCollective) -> Weights:
        states = begin()
        outer = Outer(states, LocalSGD(), group=group, every=1)
        for state in states.values():
            state.parameter.data += group.rank
        outer.step_done(0, tokens=0.0 if group.rank == 2 else 5.0, last=True)
        return flat(states)

    for weights in on_workers(run):
        torch.testing.assert_close(weights, flat(begin()) + 0.5, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("wire", "off"), [("bf16", 0.03), ("int8", 0.03), ("topk:0.5", 0.1), ("powersgd:1", 0.1)])
def test_what_a_wire_leaves_out_is_made_up_for_and_all_workers_stay_alike(wire, off) -> None:
    def run(group: OutsideCollective, wire: str) -> Weights:
        states = begin()
        for state in states.values():
            state.parameter.data = state.parameter.data.float()
        compress = compressing(Communication(gradients=wire))
        outer = Outer(states, LocalSGD(), group=group, every=EVERY, compress=compress)
        for step in range(30 * EVERY):
            for state in states.values():
                state.parameter.data = inner(state.parameter.data, group.rank, 0)
            outer.step_done(step, tokens=1.0, last=False)
        return flat(states)

    exact = on_workers(lambda group: run(group, "none"))[0]
    found = on_workers(lambda group: run(group, wire))
    assert not torch.equal(found[0], exact)
    for weights in found:
        assert torch.equal(weights, found[0])
        torch.testing.assert_close(weights, exact, rtol=0, atol=off)


def test_a_plan_says_who_the_workers_are_and_what_they_exchange() -> None:
    written = {"layout": "dp=2,pp=2", "training": {"steps": 8, "global_batch": 8}}
    model = nn.Linear(1024, 512, bias=False)
    assert workers_note(run_from(written), model) == ""
    told = workers_note(run_from({**written, "asynchronous": {"every": 4, "fragments": 2, "wire": "bf16"}}), model)
    assert "2 of 2 ranks" in told
    assert "diloco every 4 steps" in told
    assert "2 MiB of each worker are summed, in 2 parts one behind the other, compressed by bf16" in told
