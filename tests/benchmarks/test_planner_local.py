"""What is told of predictions and measurements on this machine: errors, choice, order; and that measuring is gone on
with where it was stopped."""

from __future__ import annotations

import statistics
from collections.abc import Hashable
from pathlib import Path

import pytest

from benchmarks.planner.local_score import Outcome, chosen_of, figures_of, levelled
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


def test_what_a_minute_does_to_all_that_are_timed_in_it_is_taken_out_again() -> None:
    true = {number: 1.0 + number / 10 for number in range(12)}
    pace = [1.0, 1.4, 0.8, 1.0, 1.2, 1.0]
    companies = [range(6), range(6, 12), range(0, 12, 2), range(1, 12, 2), range(3, 9), [0, 1, 2, 9, 10, 11]]
    visits: dict[Hashable, list[tuple[int, float]]] = {number: [] for number in true}
    for turn, company in enumerate(companies):
        for number in company:
            visits[number].append((turn, true[number] * pace[turn]))
    found = {number: statistics.median(own) for number, own in levelled(visits).items()}
    ratios = [found[number] / true[number] for number in true]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-3)


def test_what_was_measured_is_read_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "local.json")
    entry = store.of("some", 2, "dp=2")
    entry.peak_bytes = [1, 2]
    entry.runs.append({"turn": 7, "step_s": 0.5, "spread": 0.01})
    store.of("some", 2, "never measured")
    store.keep({"machine": "this"})
    again = Store(tmp_path / "local.json")
    assert again.about == {"machine": "this"}
    assert again.timed(2) == {("some", "dp=2"): [(7, 0.5)]}
    assert again.timed(4) == {}
    assert again.next_turn() == 8
    assert again.of("some", 2, "dp=2").peak_bytes == [1, 2]
    assert not again.of("some", 2, "never measured").peak_bytes
