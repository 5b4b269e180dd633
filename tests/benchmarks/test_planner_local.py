"""What is told of predictions and measurements on this machine: errors, choice, order; and that measuring is gone on
with where it was stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.planner.local_score import Outcome, chosen_of, figures_of
from benchmarks.planner.local_store import Store


def outcome(layout: str, predicted: float, *measured: float, held: tuple[int, ...] = (100, 100)) -> Outcome:
    return Outcome(
        model="some",
        ranks=2,
        layout=layout,
        predicted_s=predicted,
        predicted_bytes=(100.0, 110.0),
        measured_bytes=held,
        runs_s=measured,
    )


def test_errors_are_of_what_was_measured() -> None:
    found = figures_of([outcome("a", 1.1, 1.0), outcome("b", 1.8, 2.0), outcome("c", 4.0, 2.0)], 2)
    assert found.time_median == pytest.approx(0.1)
    assert found.time_largest == pytest.approx(1.0)
    assert found.memory_median == pytest.approx(0.05)
    assert found.layouts == 3


def test_what_was_not_timed_counts_for_memory_alone() -> None:
    found = figures_of([outcome("a", 1.0, 1.0), outcome("b", 9.0, held=(50, 110))], 2)
    assert found.time_median == 0
    assert found.memory_largest == pytest.approx(1.0)


def test_the_chosen_layout_is_held_against_the_best_measured() -> None:
    found = chosen_of([outcome("predicted best", 1.0, 1.3, 1.1), outcome("best", 1.1, 1.0, 1.0)])
    assert found.layout == "predicted best"
    assert found.best == "best"
    assert found.behind == pytest.approx(0.2)
    assert found.noise == pytest.approx(0.1 / 1.2)


def test_of_many_visits_the_noise_is_what_their_median_is_uncertain_by() -> None:
    visits = [1.0 + 0.01 * step for step in range(-50, 51)] * 4
    assert outcome("a", 1.0, *visits).noise == pytest.approx(1.25 * 1.48 * 0.255 / 404**0.5, rel=0.02)
    assert outcome("a", 1.0, *[1.0] * 9, 3.0).noise == 0  # one visit while the machine did something else


def test_order_is_that_of_all_layouts_of_a_model() -> None:
    found = figures_of([outcome("a", 1.0, 3.0), outcome("b", 2.0, 4.0), outcome("c", 3.0, 5.0)], 2)
    assert found.spearman == {"some": pytest.approx(1.0)}


def test_what_was_measured_is_read_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "local.json")
    entry = store.of("some", 2, "dp=2")
    entry.peak_bytes = [1, 2]
    entry.runs.append({"step_s": 0.5, "spread": 0.01})
    store.of("some", 2, "never measured")
    store.keep({"machine": "this"})
    again = Store(tmp_path / "local.json")
    assert again.about == {"machine": "this"}
    assert again.of("some", 2, "dp=2").runs_s == (0.5,)
    assert again.of("some", 2, "dp=2").peak_bytes == [1, 2]
    assert not again.of("some", 2, "never measured").peak_bytes
