"""`shardwise rehearse`: peak, lines, traffic beside what is predicted, in words and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardwise.cli import run_command

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    return str(path)


def test_a_config_is_rehearsed_in_words(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["--layout", "dp=2,pp=2", "--world", "1024", "--rank", "37", "--device", "fake"]
    assert run_command(["rehearse", "--model-config", config, "--sequence-length", "16", *layout]) == 0
    told = capsys.readouterr().out
    assert "rank 37 of 1024: dp=512,pp=2" in told
    assert "peak of a step" in told
    assert "dp.all_reduce" in told
    assert "0F0" in told


def test_predicted_traffic_is_what_is_sent(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["--layout", "dp=2,pp=2,tp=2", "--rank", "7", "--device", "fake", "--json"]
    assert run_command(["rehearse", "--model-config", config, "--sequence-length", "16", *layout]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stages"] == [1]
    for kind in ("pp.send", "tp.all_reduce", "dp.all_reduce"):
        assert found["sent_bytes"][kind]["predicted"] == found["sent_bytes"][kind]["rehearsed"] > 0
    for line in ("parameters", "optimizer"):
        assert found["lines"][line]["predicted"] == pytest.approx(found["lines"][line]["rehearsed"], rel=0.02)


def test_what_is_rehearsed_must_be_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["rehearse"]) == 1
    assert "but neither of them is given" in capsys.readouterr().err
