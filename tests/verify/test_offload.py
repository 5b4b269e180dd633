"""What forwards keep waits on the host, on several ranks and as a schedule says: equal to one device."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import make

from shardwise.launch import RankStarter
from shardwise.layout import Layout
from shardwise.plan.sources import OffloadedSource, source_of
from shardwise.verify import verify


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("bert", "pp=2,schedule=gpipe,micro_batches=4,offload=activations"),
        ("llama", "pp=2,schedule=zb-h1,tp=2,offload=activations,recompute=selective"),
    ],
)
def test_layouts_that_offload_are_one_device(name: str, layout: str, starter: RankStarter) -> None:
    example = make(name)
    comparison = verify(
        example.model, example.batch, layout=layout, loss=example.loss, starter=starter, steps=2, timeout_s=100
    )
    assert comparison.equal, str(comparison)


def test_a_schedule_in_a_file_moves_what_it_says(tmp_path: Path, starter: RankStarter) -> None:
    source = source_of(Layout(pp=2, schedule="gpipe"))
    assert source is not None
    path = tmp_path / "schedule.json"
    path.write_text(OffloadedSource(source=source)(4).to_json())
    example = make("bert")
    layout = f"pp=2,micro_batches=4,schedule={path}"
    comparison = verify(example.model, example.batch, layout=layout, loss=example.loss, starter=starter, timeout_s=100)
    assert comparison.equal, str(comparison)
