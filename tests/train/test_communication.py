"""What a run file says of communication: read, checked when read, with one error that says what to write."""

from __future__ import annotations

from typing import Any

import pytest

from shardwise.errors import ConfigError
from shardwise.layout import Communication
from shardwise.train.run_file import Run, run_from

TRAINING: dict[str, Any] = {"steps": 3, "global_batch": 4}


def run_with(**tables: Any) -> Run:
    return run_from({"training": TRAINING, "layout": "dp=2", **tables})


def test_what_is_said_becomes_a_technique() -> None:
    said = {"gradients": "powersgd:4", "activations": "int8", "algorithm": "ring"}
    assert run_with(communication=said).techniques.communication == Communication(**said)
    assert run_with().techniques.communication == Communication()


@pytest.mark.parametrize("gradients", ["none", "bf16", "fp16", "int8", "powersgd:1", "topk:0.01", "topk:1"])
def test_compressions_that_there_are(gradients: str) -> None:
    assert run_with(communication={"gradients": gradients}).techniques.communication.gradients == gradients


@pytest.mark.parametrize(
    "table, told",
    [
        ({"gradients": "powersgd"}, 'gradients = "powersgd" is no compression; use .*"powersgd:4"'),
        ({"gradients": "powersgd:0"}, "a rank of 1 or more"),
        ({"gradients": "topk:2"}, "a fraction above 0, at most 1"),
        ({"gradients": "bf16:2"}, "is no compression"),
        ({"activations": "topk:0.1"}, "activations='topk:0.1' is not one of none, bf16, fp16, int8"),
        ({"algorithm": "star"}, "algorithm='star' is not one of auto, ring, tree, hierarchical"),
        ({"weights": "bf16"}, "weights"),
    ],
)
def test_what_there_is_not_is_one_clear_error(table: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        run_with(communication=table)


def test_what_is_left_out_for_later_and_a_scale_that_changes_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="give loss_scale a number"):
        run_with(communication={"gradients": "int8"}, precision={"compute": "float16"})
    run_with(communication={"gradients": "int8"}, precision={"compute": "float16", "loss_scale": 1024})
    run_with(communication={"gradients": "bf16"}, precision={"compute": "float16"})


def test_the_dtype_of_sums_is_a_compression() -> None:
    narrow = {"compute": "bfloat16", "reduce": "bfloat16"}
    assert run_with(precision=narrow).techniques.communication == Communication(gradients="bf16")
    with pytest.raises(ConfigError, match="gradients are summed in one way"):
        run_with(precision=narrow, communication={"gradients": "int8"})
