"""Every example at tiny size, through the launcher that its command uses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from examples.run import Example, last_figures, main
from shardwise.errors import ConfigError
from shardwise.events import read_events
from tasks.test_images import write_idx
from tasks.test_token_classification import data  # noqa: F401  # a fixture

SMALL = ["training.steps=4", "training.global_batch=8", "training.warm_up=1", "training.evaluate_every=4"]


def ran(capsys: pytest.CaptureFixture[str], *arguments: str, values: list[str]) -> dict[str, object]:
    """What the example's last line says."""
    told = main([*arguments, *(part for each in [*SMALL, *values] for part in ("--set", each))])
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == told
    return told


def small_bert(folder: Path) -> str:
    """A checkpoint of a BERT without a head, beside the tokenizer that is in the folder."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=False)
    config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors")
    return f'model.path="{folder}"'


def test_ner_trains_a_checkpoint_without_a_head_and_tells_f1(data, tmp_path, capsys) -> None:  # noqa: F811
    values = [small_bert(data), f'folder="{tmp_path / "run"}"', "layout=pp=2", "training.global_batch=2"]
    told = ran(capsys, "ner", "--data", str(data), values=[*values, "task.pad_to=4"])
    assert told["example"] == "ner"
    assert told["equal"] is None
    assert 0 <= float(str(told["f1"])) <= 1
    plan = next(event for event in read_events(tmp_path / "run" / "events") if event.kind == "plan")
    assert "classifier.weight, classifier.bias: not in" in str(plan.data["text"])


def test_images_learn_what_the_first_pixel_tells(tmp_path, capsys) -> None:
    write_idx(tmp_path, train=24, held_out=12, side=8)
    values = [
        f'folder="{tmp_path / "run"}"',
        "layout=dp=2",
        "training.steps=6",
        "task.classes=[]",
        "training.evaluate_every=6",
    ]
    values += ["model.config.hidden_sizes=[8,8,8]", "model.config.embedding_size=8", "model.batch_norm=synchronised"]
    told = ran(capsys, "images", "--data", str(tmp_path), values=values)
    assert told["example"] == "images"
    assert told["accuracy"] == pytest.approx(last_figures(tmp_path / "run" / "events")["accuracy"], abs=1e-4)


def test_an_unknown_example_and_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"an example is one of .*ner.*, but got 'nerr'"):
        main(["nerr"])
    with pytest.raises(ConfigError, match=r"which is no folder; see examples/ner/README.md"):
        main(["ner", "--data", str(tmp_path / "nowhere")])


@pytest.mark.parametrize("name", ["ner", "images", "detection"])
def test_every_example_has_a_page_and_a_figure(name: str) -> None:
    example = Example.read(name)
    assert example.figure
    assert example.get
    page = Path("examples") / name / "README.md"
    assert example.figure in page.read_text(encoding="utf-8")
