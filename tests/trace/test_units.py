"""Which modules are placed whole."""

from __future__ import annotations

import pytest
import torch.nn as nn

from shardwise.errors import ModelError
from shardwise.trace.units import choose_units


def model() -> nn.Module:
    block = lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))  # noqa: E731
    body = nn.Module()
    body.layers = nn.ModuleList(block() for _ in range(4))
    body.norm = nn.LayerNorm(8)
    whole = nn.Module()
    whole.embed, whole.body, whole.dropout, whole.head = nn.Embedding(5, 8), body, nn.Dropout(), nn.Linear(8, 5)
    return whole


def test_repeated_blocks_stay_whole_and_what_has_no_parameters_is_glue() -> None:
    layers = [f"body.layers.{i}" for i in range(4)]
    assert list(choose_units(model())) == ["embed", *layers, "body.norm", "head"]


def test_named_units_are_taken_as_they_are() -> None:
    assert list(choose_units(model(), named=["body"])) == ["embed", "body", "head"]
    assert "body.layers.0.2" in choose_units(model(), named=["body.layers.0.2"])


def test_every_parameter_belongs_to_at_most_one_unit() -> None:
    units = choose_units(model())
    owned = [parameter for unit in units.values() for parameter in unit.parameters()]
    assert len(owned) == len({id(parameter) for parameter in owned})


def test_a_name_that_the_model_lacks_is_refused_with_names_that_are_close() -> None:
    with pytest.raises(ModelError, match="no 'decoder.layers.0'; did you mean ."):
        choose_units(model(), named=["decoder.layers.0"])
