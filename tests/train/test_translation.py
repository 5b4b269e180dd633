"""An encoder-decoder that learns to translate: the same curve, translations and scores on one device and on layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwise.events import Event, read_events
from shardwise.launch import RankContext
from shardwise.testing import on_ranks
from shardwise.train.run import prepare, train_on_rank
from shardwise.train.run_file import run_from
from tasks.test_translation import data  # noqa: F401  # a fixture
from train.test_training import alone

CONFIG = {
    "model_type": "marian",
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "scale_embedding": True,
}
TRAINING = {"steps": 6, "global_batch": 12, "learning_rate": 1e-2, "warm_up": 2, "seed": 3, "evaluate_every": 6}
TASK = {"vocabulary_size": 280, "pad_to": 8, "rows": 4, "translated": 6, "held_out_fraction": 0.1, "alike": 4}


def told(folder: Path, rank: int = 0) -> tuple[list[float], Event]:
    """The losses of all steps, and the evaluation."""
    events = list(read_events(folder / "events" / f"rank-{rank:05d}.jsonl"))
    evaluations = [event for event in events if event.kind == "evaluation"]
    return [float(str(event.data["loss"])) for event in events if event.kind == "step"], evaluations[-1]


@on_ranks(2, timeout_s=90)
@pytest.mark.parametrize(
    "layout",
    [
        "pp=2,micro_batches=3",
        pytest.param("dp=2", marks=pytest.mark.slow),
        pytest.param("tp=2", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_translate_as_one(rank: RankContext, data: Path, layout: str) -> None:  # noqa: F811
    task = {"kind": "translation", "data": str(data), "cache": str(data / f"cache-{rank.rank}"), **TASK}
    described = {"folder": str(data / "run"), "layout": layout, "model": {"config": CONFIG}, "task": task}
    job = prepare(run_from({**described, "training": TRAINING}))
    losses = list(train_on_rank(rank, job).losses)
    alone(job, rank.rank)
    here, one = told(data / "run", rank.rank), told(data / f"run-alone-{rank.rank}")
    assert here[0] == losses
    assert losses == pytest.approx(one[0], rel=2e-5)  # float32 sums in another order, over six steps
    assert here[1].data["report"] == one[1].data["report"]  # the same translations
    assert here[1].data["figures"] == one[1].data["figures"]
    assert set(here[1].data["figures"]) == {"bleu", "chrf", "bleu_of_copying"}
