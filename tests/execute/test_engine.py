"""The engine runs rows of actions: two stages on one rank hand over without a send, two ranks by messages."""

from __future__ import annotations

import contextlib
import gc
import queue
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence

import pytest
import torch
import torch.nn as nn
from torch.multiprocessing.reductions import StorageWeakRef

import awkward_models as awkward
from shardwise.errors import DataflowError
from shardwise.execute.batches import MicroBatch
from shardwise.execute.engine import Engine
from shardwise.execute.flows import Flows
from shardwise.execute.stage import StageRun
from shardwise.execute.step_state import Work
from shardwise.schedule.actions import Action, Transfer, parse_row, print_row
from shardwise.trace.capture import capture
from shardwise.trace.install import Switch, installed
from shardwise.trace.randomness import Scope

PLACEMENT = {(f"layers.{index}", 0): index // 2 for index in range(4)}
HALVES = [torch.linspace(-2, 2, 4 * awkward.WIDTH).sin().view(4, awkward.WIDTH) * scale for scale in (1.0, 0.5)]


class NoTransport:
    """There is nobody to send to."""

    def isend(self, tensor: torch.Tensor, peer: int) -> None:
        raise AssertionError(f"sends to {peer}")

    def irecv(self, tensor: torch.Tensor, peer: int) -> None:
        raise AssertionError(f"receives from {peer}")


class Mail:
    """Two ranks as threads; tensors of a direction arrive in order."""

    def __init__(self) -> None:
        self.boxes = {(0, 1): queue.Queue[torch.Tensor](), (1, 0): queue.Queue[torch.Tensor]()}

    def of(self, rank: int) -> Mailbox:
        return Mailbox(self, rank)


class Mailbox:
    def __init__(self, mail: Mail, rank: int) -> None:
        self.mail, self.rank = mail, rank

    def isend(self, tensor: torch.Tensor, peer: int) -> Arrival:
        self.mail.boxes[(self.rank, peer)].put(tensor.clone())
        return Arrival(None, None)

    def irecv(self, tensor: torch.Tensor, peer: int) -> Arrival:
        return Arrival(self.mail.boxes[(peer, self.rank)], tensor)


class Arrival:
    def __init__(self, box: queue.Queue[torch.Tensor] | None, buffer: torch.Tensor | None) -> None:
        self.box, self.buffer = box, buffer

    def wait(self) -> None:
        if self.box is not None and self.buffer is not None:
            self.buffer.copy_(self.box.get(timeout=20))


class Pipeline:
    """One rank's engine over a model with the switch installed, and the works of two micro-batches."""

    def __init__(self, model: nn.Module, *, rank: int, rank_of_stage: tuple[int, ...], transport: object) -> None:
        self.model = model
        self.switch = Switch()
        tape = capture(model, (HALVES[0],)).tape
        self.installed = installed({name: model.get_submodule(name) for name in tape.units}, self.switch)
        self.installed.__enter__()
        self.flows = Flows(model, switch=self.switch, placement=PLACEMENT, num_stages=2, loss=None)
        self.engine = Engine(
            model,
            switch=self.switch,
            loss=None,
            rank=rank,
            rank_of_stage=rank_of_stage,
            transport=transport,  # type: ignore[arg-type]
            device=torch.device("cpu"),
        )
        self.works = [self.work(index, half) for index, half in enumerate(HALVES)]

    def install_sums(self) -> None:
        """Weight gradients may be put off. (Behind the switch of the units here, which are no linear layers.)"""
        units = [f"layers.{index}" for index in range(4)]
        self.engine._sums.install(self.model, units, dict(self.model.named_parameters()))

    def work(self, index: int, half: torch.Tensor) -> Work:
        scope = Scope(seed=0, step=0, micro_batch=index, samples=tuple(range(4)), place="glue", call=0)
        micro_batch = MicroBatch(index=index, samples=tuple(range(4)), inputs=(half,), weight=4.0)
        return Work(micro_batch, self.flows.flow_of(micro_batch, scope), 0.5, scope, headers=True)

    def close(self) -> None:
        self.installed.__exit__(None, None, None)


@pytest.fixture
def on_one_rank() -> Iterator[Pipeline]:
    pipeline = Pipeline(awkward.Awkward(), rank=0, rank_of_stage=(0, 0), transport=NoTransport())
    yield pipeline
    pipeline.close()


def row(text: str) -> tuple[Action | Transfer, ...]:
    return parse_row(text)


def wanted() -> tuple[list[float], dict[str, torch.Tensor]]:
    model = awkward.Awkward()
    losses = [model(half) for half in HALVES]
    sum(loss * 0.5 for loss in losses).backward()
    return [float(loss.detach()) for loss in losses], {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def assert_gradients(model: nn.Module, names: set[str] | None = None) -> None:
    for name, gradient in wanted()[1].items():
        if names is None or name in names:
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-5, atol=1e-7)


def test_two_stages_of_one_rank_hand_over_without_a_send(on_one_rank: Pipeline) -> None:
    losses, moments = on_one_rank.engine.run(row("0F0 1F0 1B0 0B0 0F1 1F1 1B1 0B1"), on_one_rank.works)
    assert [float(losses[m]) for m in (0, 1)] == pytest.approx(wanted()[0])
    assert_gradients(on_one_rank.model)
    assert print_row(tuple(moment.action for moment in moments)) == "0F0 1F0 1B0 0B0 0F1 1F1 1B1 0B1"
    assert all(moment.start_s < moment.ready_s <= moment.end_s for moment in moments)  # inputs first, then computing


def test_two_ranks_exchange_what_the_row_says() -> None:
    mail = Mail()
    rows = ["0F0 0S1F0 0R1B0 0F1 0S1F1 0R1B1 0B0 0B1", "1R0F0 1F0 1R0F1 1B0 1S0B0 1F1 1B1 1S0B1"]
    pipelines = [Pipeline(awkward.Awkward(), rank=r, rank_of_stage=(0, 1), transport=mail.of(r)) for r in (0, 1)]
    results: dict[int, dict[int, torch.Tensor]] = {}

    def run(rank: int) -> None:
        results[rank] = pipelines[rank].engine.run(row(rows[rank]), pipelines[rank].works)[0]

    first = threading.Thread(target=run, args=(0,))
    first.start()
    run(1)
    first.join(timeout=30)
    assert results[0] == {}
    assert [float(results[1][m]) for m in (0, 1)] == pytest.approx(wanted()[0])
    names = [name for name, _ in awkward.Awkward().named_parameters()]
    assert_gradients(pipelines[0].model, {name for name in names if name.startswith(("layers.0", "layers.1"))})
    assert_gradients(pipelines[1].model, {name for name in names if name.startswith(("layers.2", "layers.3"))})


class Told:
    """Who waits for gradients, and notes what it is told."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.notes: list[str] = []

    def begin(self, order: Sequence[int]) -> None:
        self.notes.append(f"stages end {list(order)}")

    @contextlib.contextmanager
    def during(self, stage: int) -> Iterator[None]:
        self.notes.append(f"last backward of {stage}")
        yield

    def end(self, stage: int, *, but: Collection[int] = ()) -> None:
        self.notes.append(f"{stage} ends" + (f" but {len(but)}" if but else ""))

    def final(self, parameter: nn.Parameter) -> None:
        self.notes.append(self.names[id(parameter)])


def test_whoever_waits_is_told_of_the_last_forward_and_of_the_last_backward_of_each_stage(
    on_one_rank: Pipeline,
) -> None:
    told = Told(on_one_rank.model)

    def after(losses: Mapping[int, torch.Tensor]) -> None:
        told.notes.append(f"losses of {sorted(losses)}")

    on_one_rank.engine.run(
        row("0F0 1F0 0F1 1F1 1B0 0B0 1B1 0B1"), on_one_rank.works, gradients=told, after_last_forward=after
    )
    assert told.notes == [
        "stages end [1, 0]",
        "losses of [0, 1]",
        "last backward of 1",
        "1 ends",
        "last backward of 0",
        "0 ends",
    ]


def test_gradients_are_final_behind_the_last_weight_gradients_or_where_the_row_reduces_them(
    on_one_rank: Pipeline,
) -> None:
    on_one_rank.install_sums()
    told = Told(on_one_rank.model)
    on_one_rank.engine.run(row("0F0 1F0 1I0 0I0 0F1 1F1 1I1 0B1 1W1 1W0 0W0 0G"), on_one_rank.works, gradients=told)
    assert told.notes == [
        "stages end [1, 0]",
        "1 ends but 4",  # weights and biases of two layers, in the order of the backward
        "layers.3.linear.weight",
        "layers.3.linear.bias",
        "layers.2.linear.weight",
        "layers.2.linear.bias",
        "0 ends",
    ]
    assert_gradients(on_one_rank.model)


SPLIT = [
    "0F0 1F0 1I0 0I0 1W0 0W0 0F1 1F1 1I1 0I1 1W1 0W1",
    "0F0 1F0 0F1 1F1 1I0 0I0 1I1 0I1 0W1 1W1 0W0 1W0",  # weights in another order than inputs
    "0F0 1F0 0F1 1F1 1B0 0I0 1I1 0B1 1W1 0W0",  # whole and split ones
    "0F0 1F0 1I0 1W0 0I0 0W0 0F1 1F1 1I1 1W1 0I1 0W1",  # halves with nothing between are one
]


@pytest.mark.parametrize("text", SPLIT)
@pytest.mark.parametrize("installed_sums", [True, False])
def test_halves_of_a_backward_are_the_whole(on_one_rank: Pipeline, text: str, installed_sums: bool) -> None:
    if installed_sums:
        on_one_rank.install_sums()
    losses, moments = on_one_rank.engine.run(row(text), on_one_rank.works)
    assert [float(losses[m]) for m in (0, 1)] == pytest.approx(wanted()[0])
    assert_gradients(on_one_rank.model)
    assert print_row(tuple(moment.action for moment in moments)) == text


def test_weights_wait_for_their_action(on_one_rank: Pipeline) -> None:
    on_one_rank.install_sums()
    model = on_one_rank.model
    on_one_rank.engine.run(row("0F0 1F0 1I0 0I0"), on_one_rank.works)
    assert model.get_parameter("layers.0.linear.weight").grad is None
    assert model.get_parameter("layers.0.norm.weight").grad is not None  # not put off: cheap


@pytest.mark.parametrize(
    "text", ["0F0 1F0 1C0 1B0 0C0 0B0 0F1 1F1 1B1 0C1 0B1", "0F0 1F0 0F1 1F1 1C0 1I0 0C0 0I0 1W0 1B1 0C1 0B1 0W0"]
)
def test_a_forward_that_is_run_again_keeps_only_its_inputs(on_one_rank: Pipeline, text: str) -> None:
    on_one_rank.install_sums()
    losses, _ = on_one_rank.engine.run(row(text), on_one_rank.works)
    assert [float(losses[m]) for m in (0, 1)] == pytest.approx(wanted()[0])
    assert_gradients(on_one_rank.model)


def test_what_a_forward_made_is_free_until_it_is_run_again(on_one_rank: Pipeline) -> None:
    made: list[StorageWeakRef] = []
    alive: list[tuple[str, int]] = []
    norm = on_one_rank.model.get_submodule("layers.0.norm")  # the linear layer behind it keeps its output
    norm.register_forward_hook(lambda module, args, out: made.append(StorageWeakRef(out.untyped_storage())))

    def before(action: Action) -> None:
        alive.append((str(action), sum(not out.expired() for out in made)))

    on_one_rank.engine.run(row("0F0 1F0 1C0 1B0 0C0 0B0"), on_one_rank.works, before_action=before)
    assert alive == [("0F0", 0), ("1F0", 0), ("1C0", 0), ("1B0", 0), ("0C0", 0), ("0B0", 1)]
    assert len(made) == 2


def test_what_a_forward_keeps_may_go_and_come_back(on_one_rank: Pipeline) -> None:
    """Nobody has given this engine a place for it: it stays."""
    losses, moments = on_one_rank.engine.run(row("0F0 0O0 1F0 1B0 0L0 0B0"), on_one_rank.works)
    assert len(losses) == 1
    assert [str(moment.action) for moment in moments] == ["0F0", "1F0", "1B0", "0B0"]


def test_gradients_that_are_reduced_too_early_are_refused(on_one_rank: Pipeline) -> None:
    with pytest.raises(DataflowError, match="0G stands ahead of 0B0"):
        on_one_rank.engine.run(row("0F0 1F0 1B0 0G 0B0"), [])


def test_without_gradients_a_forward_keeps_nothing(on_one_rank: Pipeline) -> None:
    with torch.no_grad():
        losses, _ = on_one_rank.engine.run(row("0F0 1F0 0F1 1F1"), on_one_rank.works)
    assert [float(losses[m]) for m in (0, 1)] == pytest.approx(wanted()[0])
    assert all(parameter.grad is None for parameter in on_one_rank.model.parameters())


def test_what_a_step_held_is_free_behind_it_without_a_garbage_collection(on_one_rank: Pipeline) -> None:
    steps = row("0F0 1F0 1B0 0B0 0F1 1F1 1B1 0B1")
    on_one_rank.engine.run(steps, on_one_rank.works)
    gc.collect()
    gc.disable()
    try:
        on_one_rank.engine.run(steps, on_one_rank.works)
        assert not [thing for thing in gc.get_objects() if type(thing) is StageRun]
    finally:
        gc.enable()
