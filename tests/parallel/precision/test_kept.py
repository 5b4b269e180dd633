"""What stays in float32 is found by kind and by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from shardwise.errors import ConfigError
from shardwise.parallel.precision.kept import kept_modules, narrow_names


class TopKRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 8))


class RMSNorm2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))


class Normalizer(nn.Module):  # no norm: it holds a layer
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.gate = nn.Linear(8, 4)
        self.gate_proj = nn.Linear(8, 8)
        self.router = TopKRouter()
        self.norm = nn.LayerNorm(8)
        self.batch = nn.BatchNorm2d(8)
        self.rms = RMSNorm2()
        self.other = Normalizer()
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight


def test_norms_and_routers_are_kept_and_layers_that_only_sound_like_them_are_not() -> None:
    assert set(kept_modules(Model(), ("norms",))) == {"norm", "batch", "rms"}
    assert set(kept_modules(Model(), ("routers",))) == {"gate", "router"}


def test_modules_are_kept_by_name_with_all_that_is_in_them() -> None:
    assert set(kept_modules(Model(), ("other", "gate*"))) == {"other", "gate", "gate_proj"}
    model = Model()
    assert "other.layer.weight" not in narrow_names(model, list(kept_modules(model, ("other",)).values()))


def test_a_name_of_no_module_is_refused() -> None:
    with pytest.raises(ConfigError, match="no 'lm_head'"):
        kept_modules(Model(), ("norms", "lm_head"))


def test_the_rest_is_narrow_and_a_table_that_a_kept_module_shares_is_not() -> None:
    model = Model()
    assert "embed.weight" in narrow_names(model, [])
    assert narrow_names(model, [model.head]).isdisjoint({"embed.weight", "head.weight"})


def test_parameters_that_are_in_16_bits_already_have_no_masters() -> None:
    with pytest.raises(ConfigError, match="give the model in float32"):
        narrow_names(Model().bfloat16(), [])
