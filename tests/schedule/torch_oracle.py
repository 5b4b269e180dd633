"""Torch's own schedules without processes or models: their runtime with the few values that its orders depend on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch.distributed.pipelining import schedules as theirs

__all__ = ["STYLES", "runnable", "runtime"]

STYLES = {
    "interleaved": theirs.ScheduleInterleaved1F1B,
    "looped-bfs": theirs.ScheduleLoopedBFS,
    "zb-h1": theirs.ScheduleInterleavedZeroBubble,
    "zb-v": theirs.ScheduleZBVZeroBubble,
    "dualpipe-v": theirs.ScheduleDualPipeV,
}


def runtime(num_ranks: int, chunks: int, num_micro_batches: int, kind: type = theirs._PipelineScheduleRuntime) -> Any:
    """A runtime of torch that loads and dumps; of a named schedule, with the orders of all ranks."""
    made = kind.__new__(kind)
    made.pp_group_size, made.n_local_stages, made._num_stages = num_ranks, chunks, num_ranks * chunks
    made.num_stages, made._n_microbatches, made._defer_pp_recv = made._num_stages, num_micro_batches, False
    made.number_of_rounds = max(1, num_micro_batches // num_ranks)
    made.microbatches_per_round = num_micro_batches // made.number_of_rounds
    made._stages = [SimpleNamespace() for _ in range(chunks)]
    made.pipeline_order, made.rank = {}, 0
    if kind is not theirs._PipelineScheduleRuntime:
        for made.rank in range(num_ranks):
            made.pipeline_order[made.rank] = made._calculate_single_rank_operations(made.rank)
        made._prepare_schedule_with_comms({r: list(row) for r, row in made.pipeline_order.items()})
    return made


def runnable(made: Any) -> bool:
    """Whether torch's dry run, in which a receive waits for its send, gets through; it raises if not."""
    unknown = (theirs.UNSHARD, theirs.RESHARD, theirs.REDUCE_GRAD)  # to the dry run; none of them waits for a rank
    order = {
        r: [action for action in row if action.computation_type not in unknown]
        for r, row in made.pipeline_order_with_comms.items()
    }
    theirs._simulate_comms_compute(order, lambda s: made.stage_index_to_group_rank[s], made._num_stages)
    return True
