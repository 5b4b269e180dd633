"""A precision is checked when it is made, and says in one phrase what it asks for."""

from __future__ import annotations

import pytest

from shardwise.errors import ConfigError
from shardwise.layout import Communication, Precision, Techniques


def test_nothing_is_asked_for_by_default() -> None:
    assert Precision().label == ""
    assert not Precision().is_narrow
    assert not Precision().scales_loss


def test_16_bits_are_held_unless_they_are_emulated() -> None:
    assert Precision(compute="bfloat16").is_narrow
    assert not Precision(compute="bfloat16", emulate=True).is_narrow
    assert Precision(compute="bfloat16", emulate=True).label.startswith("emulated bfloat16")
    assert Precision(compute="float16", deterministic=True).label == "float16 with float32 masters, deterministic"


@pytest.mark.parametrize(
    ("compute", "given", "scales", "dynamic"),
    [
        ("float16", None, True, True),
        ("bfloat16", None, False, False),
        ("bfloat16", "dynamic", True, True),
        ("float16", "none", False, False),
        ("float16", 1024, True, False),
    ],
)
def test_the_loss_is_scaled_for_float16_or_where_it_is_asked_for(
    compute: str, given: str | float | None, scales: bool, dynamic: bool
) -> None:
    precision = Precision(compute=compute, loss_scale=given)
    assert precision.scales_loss is scales
    assert precision.scale_is_dynamic is dynamic


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"compute": "int8"}, "not one of float32, bfloat16, float16, float8"),
        ({"reduce": "float8"}, "not one of float32, bfloat16, float16"),
        ({"logits": "bfloat16"}, "not one of compute, float32"),
        ({"emulate": True}, "emulate rounds to 16 bits"),
        ({"compute": "float8", "emulate": True}, "emulate rounds to 16 bits"),
        ({"loss_scale": "sometimes"}, "not one of dynamic, none"),
        ({"loss_scale": 0.0}, "a positive number"),
        ({"loss_scale": float("inf")}, "a positive number"),
        ({"loss_scale_window": 0}, "counts good steps"),
    ],
)
def test_what_does_not_go_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Precision(**wrong)  # type: ignore[arg-type]


def test_the_dtype_of_sums_is_that_of_their_wire() -> None:
    assert Techniques(precision=Precision(reduce="bfloat16")).communication.gradients == "bf16"
    assert Techniques().communication.gradients == "none"
    with pytest.raises(ConfigError, match="summed in one way"):
        Techniques(precision=Precision(reduce="bfloat16"), communication=Communication(gradients="int8"))
