"""The precision benchmark trains every contender on the same steps; its figures are relative to float32."""

from __future__ import annotations

import pytest

from benchmarks.precision.run import figures


def test_figures_are_losses_over_those_of_float32() -> None:
    def run(losses: list[float], held_out: float) -> dict[str, object]:
        return {"losses": losses, "held_out": held_out, "step_s": 2.0, "skipped_steps": 1}

    told = figures({"float32": run([9.0] + [2.0] * 10, 4.0), "float16": run([9.0] + [2.0] * 9 + [2.02], 4.4)})
    assert told["float16_last_step"] == pytest.approx(0.01)
    assert told["float16_last_10_steps"] == pytest.approx(0.001)
    assert told["float16_held_out"] == pytest.approx(0.1)
    assert told["float16_skipped_steps"] == 1


def test_without_float32_there_is_nothing_to_compare_with() -> None:
    assert figures({"float16": {"losses": [1.0]}}) == {}
