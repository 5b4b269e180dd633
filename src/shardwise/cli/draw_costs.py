"""Costs of a schedule: as they are written on a command line, one number or one a stage, or as a run measured them."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from shardwise.errors import ConfigError
from shardwise.schedule import Costs, Edge, Edges, Kind, chain
from shardwise.schedule.recording import Recording

__all__ = ["costs_of", "costs_of_run"]


def costs_of(
    num_stages: int,
    *,
    forward: str = "1",
    input_gradient: str | None = None,
    weight_gradient: str | None = None,
    backward: str | None = None,
    transfer: str = "0",
) -> Costs:
    """The costs of a chain of stages. A whole backward is both halves, and a half is half of it, where one is given.

    Raises ConfigError with the option.
    """
    f = _numbers("--forward", forward, num_stages)
    whole = None if backward is None else _numbers("--backward", backward, num_stages)
    half = f if whole is None else tuple(seconds / 2 for seconds in whole)
    i = half if input_gradient is None else _numbers("--input-gradient", input_gradient, num_stages)
    w = half if weight_gradient is None else _numbers("--weight-gradient", weight_gradient, num_stages)
    edges = sorted(chain(num_stages))
    on_the_way = dict(zip(edges, _numbers("--transfer", transfer, num_stages - 1), strict=True))
    return Costs(
        compute_seconds={
            Kind.F: f,
            Kind.B: whole if whole is not None else tuple(a + b for a, b in zip(i, w, strict=True)),
            Kind.I: i,
            Kind.W: w,
        },
        activation_seconds=on_the_way,
        gradient_seconds=on_the_way,
    )


def costs_of_run(recording: Recording, num_stages: int) -> Costs:
    """What was measured in a step, for any schedule of its stages, on whatever ranks they stand.

    What the step's own schedule did not do is taken from what it did: a whole backward is both halves, and each half is
    half of it; an edge within a rank takes what the others take in the median. Raises ConfigError if the run has other
    stages.
    """
    if recording.schedule.num_stages != num_stages:
        raise ConfigError(
            f"costs of a run are those of its {recording.schedule.num_stages} stages, but the schedule has "
            f"{num_stages}; write other --ranks and --chunks, or another schedule"
        )
    seconds = dict(recording.costs.compute_seconds)
    nothing = (0.0,) * num_stages
    f, b, i, w = (seconds.get(kind, nothing) for kind in (Kind.F, Kind.B, Kind.I, Kind.W))
    split = tuple(a + c for a, c in zip(i, w, strict=True))
    whole = tuple(own or halves for own, halves in zip(b, split, strict=True))
    stages = list(zip(whole, split, i, w, strict=True))
    return Costs(
        compute_seconds={
            Kind.F: f,
            Kind.B: whole,
            Kind.I: tuple(own if halves else both / 2 for both, halves, own, _ in stages),
            Kind.W: tuple(own if halves else both / 2 for both, halves, _, own in stages),
        },
        activation_seconds=_every_edge(recording.costs.activation_seconds, recording.edges),
        gradient_seconds=_every_edge(recording.costs.gradient_seconds, recording.edges),
    )


def _every_edge(seconds: Mapping[Edge, float], edges: Edges) -> Mapping[Edge, float]:
    usual = median(seconds.values()) if seconds else 0.0
    return {edge: seconds.get(edge, usual) for edge in edges}


def _numbers(option: str, text: str, count: int) -> tuple[float, ...]:
    """`count` numbers, from as many or from one."""
    try:
        numbers = tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise ConfigError(f'{option} is a number or several with commas, but got "{text}"; write 1 or 1,1,2') from error
    if len(numbers) == 1:
        return numbers * count
    if len(numbers) != count:
        each = "between two stages" if option == "--transfer" else "a stage"
        raise ConfigError(
            f"{option} has one number, or one {each}, of which there are {count}, but got {len(numbers)}; add or drop "
            "some"
        )
    return numbers
