"""How long a pipeline takes, in closed form: one formula per generator, on arrays, for any number of rows at once.

    S stages on p ranks, m micro-batches; f, b: seconds of a forward and a backward; c: of a message; w: of b, the part
    that makes gradients of weights. All exact for equal stages and free messages; tests hold them to the simulator.

Sources: Huang et al. 2019 (GPipe, section 2.3), Narayanan et al. 2021 (arXiv:2104.04473, section 2.2), Qi et al. 2024
(arXiv:2401.10241, section 2), Lamy-Poirier 2023 (arXiv:2211.05953, breadth first). Schedules without a formula are
simulated for few places and micro-batches and continued at the pace of the busiest rank (`plan.alike_pipelines`).
Refuses to know what a stage does.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import numpy.typing as npt

from shardwise.plan.alike_pipelines import fill_of
from shardwise.plan.compute import FloatArray
from shardwise.schedule import Costs, Kind, Schedule, generate, placement

__all__ = ["PipelineTimes", "costs_of_row", "generated", "pipeline_seconds"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineTimes:
    """Of a micro-batch, arrays of shape (rows, stages): forward, backward (with weight), weight. send and back
    (rows, stages): of the message to the stage behind, and of its answer; the last stage's are not used."""

    forward: FloatArray
    backward: FloatArray
    weight: FloatArray
    send: FloatArray
    back: FloatArray

    def rows(self, chosen: npt.NDArray[np.bool_]) -> PipelineTimes:
        """Some of them."""
        return PipelineTimes(**{field.name: getattr(self, field.name)[chosen] for field in dataclasses.fields(self)})

    def by_rank(self, values: FloatArray, ranks: tuple[tuple[int, ...], ...]) -> FloatArray:
        """(rows, ranks): sums over the stages that each rank owns."""
        return np.stack([values[:, list(own)].sum(axis=1) for own in ranks], axis=1)


def pipeline_seconds(times: PipelineTimes, micro_batches: FloatArray, *, schedule: str, chunks: int) -> FloatArray:
    """[row]: from the first forward to the last backward of `micro_batches[row]` micro-batches."""
    num_stages = times.forward.shape[1]
    num_ranks = num_stages // chunks
    if num_stages == 1:
        return np.asarray(micro_batches * (times.forward + times.backward)[:, 0])
    formulas = {
        "naive": _naive,
        "gpipe": _gpipe,
        "1f1b": _one_f_one_b,
        "pipedream-2bw": _one_f_one_b,
        "interleaved": _interleaved,
        "looped-bfs": _looped,
    }
    if schedule in formulas and (chunks == 1 or schedule in ("interleaved", "looped-bfs")):
        return formulas[schedule](times, micro_batches, num_ranks)
    filled = np.zeros(len(micro_batches), dtype=bool)
    if schedule in ("zb-h1", "zb-h2") and chunks == 1:
        filled = micro_batches >= 2 * num_ranks
    found = np.zeros(len(micro_batches))
    if filled.any():
        put_off = 2 if schedule == "zb-h1" else 3
        found[filled] = _zero_bubble(times.rows(filled), micro_batches[filled], num_ranks, put_off=put_off)
    if not filled.all():
        found[~filled] = _continued(times.rows(~filled), micro_batches[~filled], schedule, num_ranks, chunks)
    return found


def _trip(times: PipelineTimes) -> FloatArray:
    """(rows, stages): from the start of a forward on a stage until its backward there ends, alone in the pipeline."""
    legs = times.forward + times.backward
    legs[:, :-1] += (times.send + times.back)[:, :-1]
    return np.asarray(np.cumsum(legs[:, ::-1], axis=1)[:, ::-1])


def _naive(times: PipelineTimes, micro_batches: FloatArray, num_ranks: int) -> FloatArray:
    return np.asarray(micro_batches * _trip(times)[:, 0])


def _gpipe(times: PipelineTimes, micro_batches: FloatArray, num_ranks: int) -> FloatArray:
    """All forwards, then all backwards; each at the pace of its slowest stage or message."""
    there = np.maximum(times.forward.max(axis=1), times.send[:, :-1].max(axis=1))
    back = np.maximum(times.backward.max(axis=1), times.back[:, :-1].max(axis=1))
    return np.asarray(_trip(times)[:, 0] + (micro_batches - 1) * (there + back))


def _one_f_one_b(times: PipelineTimes, micro_batches: FloatArray, num_ranks: int) -> FloatArray:
    """Of p - s micro-batches that stage s has under way one must be back before the next may start, so that messages
    show even where they run beside computing: a micro-batch takes max over s of trip(s) / (p - s)."""
    trips = _trip(times)
    num_stages = trips.shape[1]
    alive = num_stages - np.arange(num_stages)[None, :]
    turns = np.where(micro_batches[:, None] > alive, trips / alive, 0.0)  # fewer are all under way at once
    pace = np.maximum((times.forward + times.backward).max(axis=1), turns.max(axis=1))
    return np.asarray(trips[:, 0] + (micro_batches - 1) * pace)


def _interleaved(times: PipelineTimes, micro_batches: FloatArray, num_ranks: int) -> FloatArray:
    """A rank waits for the first chunk to arrive and its gradients to leave (stages before it), and between them for
    the last chunk behind it: m v (f + b) + (p - 1)(f + b) for equal ones; fewer than p take a trip of all chunks."""
    num_stages = times.forward.shape[1]
    chunks = num_stages // num_ranks
    legs = times.forward + times.backward + times.send + times.back
    before = np.cumsum(legs, axis=1) - legs
    behind = np.cumsum(legs[:, ::-1], axis=1)[:, ::-1] - legs
    own = times.by_rank(times.forward + times.backward, placement("interleaved", num_ranks=num_ranks, chunks=chunks))
    waits = before[:, :num_ranks] + behind[:, num_stages - num_ranks :]
    alone = legs.sum(axis=1) - (times.send + times.back)[:, -1] + (micro_batches - 1) * (own / chunks).max(axis=1)
    return np.asarray(np.maximum((micro_batches[:, None] * own + waits).max(axis=1), alone))


def _looped(times: PipelineTimes, micro_batches: FloatArray, num_ranks: int) -> FloatArray:
    """Breadth first: every chunk all micro-batches; where these are fewer than ranks, a loop takes a trip's time."""
    num_stages = times.forward.shape[1]
    chunks = num_stages // num_ranks
    ranks = placement("looped-bfs", num_ranks=num_ranks, chunks=chunks)
    total = _trip(times)[:, 0]
    turns = np.maximum(micro_batches, num_ranks)
    found = np.zeros(len(total))
    for values, sent in ((times.forward, times.send), (times.backward, times.back)):
        pace = np.maximum(times.by_rank(values, ranks).max(axis=1), sent[:, :-1].max(axis=1) * chunks)
        trip = values.sum(axis=1) + sent[:, :-1].sum(axis=1)
        loops = pace / chunks * ((chunks - 1) * turns + micro_batches - 1) - (chunks - 1) * trip / chunks
        found += trip + np.maximum(loops, 0.0)
    return found


def _zero_bubble(times: PipelineTimes, micro_batches: FloatArray, num_ranks: int, *, put_off: int) -> FloatArray:
    """Gradients of weights fill the bubble: (p-1)(f + b - put_off w) of it is left, never below 0 (Qi et al., table 1,
    where b is the gradient of inputs alone). For m of 2 p or more, so that there is enough to fill it with."""
    both = times.forward + times.backward
    trips = _trip(times)[:, 0]
    pace = both.max(axis=1)
    filled = put_off * times.weight[:, 1:].sum(axis=1)
    late = times.forward[:, :-1].sum(axis=1) + pace  # the last rank begins when the first forward reaches it
    return np.asarray(np.maximum(trips - filled, late) + (micro_batches - 1) * pace)


def _continued(
    times: PipelineTimes, micro_batches: FloatArray, schedule: str, num_ranks: int, chunks: int
) -> FloatArray:
    ranks = placement(schedule, num_ranks=num_ranks, chunks=chunks)
    paces = times.by_rank(times.forward + times.backward, ranks).max(axis=1)
    found = np.zeros(len(micro_batches))
    whole = times.forward + times.backward
    for row, count in enumerate(micro_batches):
        total = float(whole[row].sum())
        fill = fill_of(
            schedule,
            num_ranks=num_ranks,
            chunks=chunks,
            num_micro_batches=int(count),
            forward=float(times.forward[row].sum()) / total,
            weight=float(times.weight[row].sum()) / total,
            send=float((times.send + times.back)[row, :-1].mean() / 2 / whole[row].mean()),
        )
        found[row] = count * paces[row] + fill * total / num_ranks
    return found


@functools.lru_cache(maxsize=16)
def generated(schedule: str, num_ranks: int, num_micro_batches: int, chunks: int) -> Schedule:
    """By that generator; the last few are kept."""
    return generate(schedule, num_ranks=num_ranks, num_micro_batches=num_micro_batches, chunks=chunks)


def costs_of_row(times: PipelineTimes, row: int) -> Costs:
    """What the simulator pays for one row."""
    forward, backward, weight = (tuple(map(float, v[row])) for v in (times.forward, times.backward, times.weight))
    inputs = tuple(max(0.0, whole - part) for whole, part in zip(backward, weight, strict=True))
    pairs = [(stage, stage + 1) for stage in range(len(forward) - 1)]
    return Costs(
        compute_seconds={Kind.F: forward, Kind.B: backward, Kind.I: inputs, Kind.W: weight},
        activation_seconds={pair: float(times.send[row, pair[0]]) for pair in pairs},
        gradient_seconds={pair: float(times.back[row, pair[0]]) for pair in pairs},
    )
