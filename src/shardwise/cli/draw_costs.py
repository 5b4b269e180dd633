"""Costs of a schedule as they are written on a command line: one number, or one a stage. Knows no file and no run."""

from __future__ import annotations

from shardwise.errors import ConfigError
from shardwise.schedule import Costs, Kind, chain

__all__ = ["costs_of"]


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
