"""The example detection at tiny size, through the launcher that its command uses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.detection.yolos import from_scratch, sines
from examples.run import last_figures
from examples.test_examples import ran
from tasks.test_images import write_idx

SMALL = ["size=16", "smallest=5", "largest=8", "train_canvases=24", "held_out_canvases=6", "classes=[]"]
MODEL = ["hidden_size=16", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=32"]


def test_detection_trains_two_stages_and_tells_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pycocotools")
    write_idx(tmp_path, train=24, held_out=12, side=8)
    values = [f'folder="{tmp_path / "run"}"', *(f"task.{each}" for each in SMALL)]
    values += [f"model.options.{each}" for each in MODEL]
    told = ran(capsys, "detection", "--data", str(tmp_path), values=values)
    assert told["example"] == "detection"
    figures = last_figures(tmp_path / "run" / "events")
    assert told["map"] == pytest.approx(figures["map"], abs=1e-4)
    assert set(figures) == {"map", "map_50", "map_75"}


def test_queries_of_a_yolos_from_scratch_begin_apart_and_patches_know_where_they_are() -> None:
    torch.manual_seed(0)
    model = from_scratch(
        {0: "hat", 1: "bag"},
        num_channels=1,
        image_size=[16, 24],
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_detection_tokens=3,
        use_mid_position_embeddings=False,
        initializer_range=0.2,
    )
    found = model(pixel_values=torch.randn(2, 1, 16, 24))
    assert found.logits.shape == (2, 3, 3)
    assert float((found.logits[:, 0] - found.logits[:, 1]).detach().abs().max()) > 0.01
    places = sines(2, 3, 16)
    assert places.shape == (6, 16)
    assert len({tuple(row) for row in places.tolist()}) == 6
