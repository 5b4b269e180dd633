"""Split backward, with everything that waits for gradients: replicas, shards, experts, tied weights, several stages.

torch 2.13 loses gradients in just these compositions, without an error.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from models import make

from shardwise.launch import RankStarter
from shardwise.schedule import Schedule, check, parse_row
from shardwise.verify import Comparison, verify

pytestmark = pytest.mark.slow  # `make verify-all`

TOLERANCE = 1e-5  # what float32 leaves of sums taken in another order

ONE_EACH = (
    "0F0 0F1 0I0 0F2 0I1 0W0 0F3 0I2 0W1 0I3 0W2 0W3",
    "1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1F3 1I3 1W2 1W3",
)
# stages 0 and 3 on rank 0, 1 and 2 on rank 1; stage 3 ends before stage 0 on one rank, and with G on the other
AS_A_V = (
    "0F0 0F1 3F0 3I0 3F1 3I1 0I0 3W0 0W0 0I1 0W1 3W1 3G 0G",
    "1F0 2F0 1F1 2F1 2I0 1I0 2I1 1I1 1W1 2W0 1W0 2W1",
)
# a loop: 0 and 2 on rank 0; whole backwards beside split ones, and forwards that are run again
AS_A_LOOP = (
    "0F0 0F1 2F0 2F1 2C0 2I0 2W0 0I0 2I1 0C1 0B1 2W1 0W0",
    "1F0 3F0 1F1 3I0 3F1 1C0 1I0 3I1 1C1 1I1 3W1 1W0 3W0 1W1",
)


def schedule_file(folder: Path, rows: tuple[str, ...]) -> str:
    actions = tuple(tuple(parse_row(row)) for row in rows)
    schedule = Schedule(
        name="by hand",
        num_stages=1 + max(a.stage for row in actions for a in row),
        num_micro_batches=1 + max(getattr(a, "micro_batch", 0) for row in actions for a in row),
        ranks=tuple(tuple(sorted({a.stage for a in row})) for row in actions),
        actions=actions,  # type: ignore[arg-type]
    )
    check(schedule)
    path = folder / "schedule.json"
    path.write_text(schedule.to_json())
    return str(path)


def verified(
    name: str, rows: tuple[str, ...], layout: str, folder: Path, starter: RankStarter, *, steps: int = 2
) -> Comparison:
    chunks, num = (1, 4) if rows is ONE_EACH else (2, 2)
    layout = f"pp=2,chunks={chunks},micro_batches={num},schedule={schedule_file(folder, rows)}{layout}"
    example = make(name)
    return verify(
        example.model, example.batch, layout=layout, loss=example.loss, starter=starter, steps=steps, timeout_s=60
    )


CASES = [
    ("gpt2", "", ONE_EACH),  # tied embedding and head; dropout
    ("gpt2", ",dp=2", AS_A_V),
    ("gpt2", ",dp=2", AS_A_LOOP),
    ("llama", ",tp=2", ONE_EACH),
    ("llama", ",tp=2", AS_A_LOOP),
    ("llama", ",tp=2,sequence_parallel=on", AS_A_V),
    ("mixtral", ",ep=2", AS_A_V),
    ("mixtral", ",ep=2", AS_A_LOOP),
    ("albert", ",dp=2", AS_A_LOOP),  # one layer on every stage: two stages of a rank hold the same parameters
    ("resnet", "", AS_A_LOOP),  # convolutions; running statistics, of which a forward that is run again writes nothing
    ("unet", "", AS_A_V),  # skip connections
]


@pytest.mark.parametrize("name, layout, rows", CASES)
def test_split_backward_is_one_device(
    name: str, layout: str, rows: tuple[str, ...], tmp_path: Path, starter: RankStarter
) -> None:
    comparison = verified(name, rows, layout, tmp_path, starter)
    assert comparison.equal, str(comparison)
    assert comparison.gradient_error <= TOLERANCE
    assert comparison.splits[0].startswith("split backward: proven equal to the whole one of ")
    assert len(comparison.splits) == 1, comparison.splits  # no unit keeps its whole backward
