"""The benchmark of generation at small size: every contender gives the same tokens, and has figures."""

from __future__ import annotations

from benchmarks.generation.run import SHAPES, measure


def test_one_device_gives_the_tokens_of_transformers_and_figures_of_both() -> None:
    found = measure(SHAPES["quick"], [""])
    assert found["equal"] is True
    assert set(found["contenders"]) == {"transformers", "one device"}
    assert all(figures["decode_tokens_per_s"] > 0 for figures in found["contenders"].values())
    shape = SHAPES["quick"]
    cached = shape.prompt_tokens + shape.new_tokens - 1
    assert found["contenders"]["one device"]["cache_bytes"] == (
        2 * shape.layers * shape.prompts * cached * shape.hidden * 4,
    )
