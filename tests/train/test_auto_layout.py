"""`layout = "auto"`: what is searched for a run, what is kept beside it, and layouts measured in steps of the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from shardwise.errors import ConfigError
from shardwise.events import read_events
from shardwise.layout import Layout
from shardwise.testing import on_ranks
from shardwise.train.asked import Asked
from shardwise.train.auto_layout import is_auto, run_on_one_device
from shardwise.train.build import Candidate
from shardwise.train.layout_search import Choice, choose, read_choice
from shardwise.train.run import prepare, train_on_rank
from shardwise.train.run_file import run_from
from train.test_training import CURVE, TASK, Decoder, alone, off

WRITTEN: dict[str, Any] = {
    "layout": "auto",
    "task": TASK,
    "training": {"steps": 20, "global_batch": 8, "learning_rate": 3e-3, "seed": 7},
    "cluster": "local2",
}


def test_a_mapping_or_a_file_asks_for_a_search_and_an_override_answers(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('layout = "auto"\n[training]\nsteps = 1\nglobal_batch = 8\n')
    for written in (WRITTEN, file, str(file)):
        assert is_auto(written)
        assert not is_auto(written, ["layout=dp=2"])
        assert is_auto(written, ["layout=dp=2", "layout=auto"])
        asked = Asked.of(written)
        assert (asked.searches, asked.run.layout.world_size, asked.run.num_micro_batches) == (True, 1, 4)
        assert not Asked.of(written, ["layout=dp=2"]).searches
        assert asked.on_layout(Layout(dp=2)).layout == Layout(dp=2)


def test_the_best_layouts_of_the_machine_are_candidates_one_for_each_mesh(tmp_path: Path) -> None:
    written = {**WRITTEN, "folder": str(tmp_path), "auto": {"measure": 3, "within": 10.0}}
    choice = choose(prepare(run_on_one_device(written), model=Decoder), written)
    layouts = [candidate.layout for candidate in choice.candidates]
    assert [layout.world_size for layout in layouts] == [2, 2, 2]
    assert len({(layout.dp, layout.fsdp * layout.zero, layout.tp, layout.pp) for layout in layouts}) == 3
    predicted = [candidate.predicted_s for candidate in choice.candidates]
    assert predicted == sorted(predicted)
    assert all(len(candidate.peak_bytes) in (1, 2) for candidate in choice.candidates)
    assert choice.told.startswith(f"layout: {layouts[0]}, of ")
    assert len(choice.told.splitlines()) <= 3
    choice.write(tmp_path)
    assert str(layouts[0]) in (tmp_path / "plan.txt").read_text()
    again = read_choice(tmp_path)
    unproven = tuple(dataclasses.replace(each, tensor=None, experts=None) for each in choice.candidates)
    assert again == dataclasses.replace(choice, candidates=unproven, explained="")
    assert [each.tensor is not None for each in choice.candidates] == [layout.tp > 1 for layout in layouts]
    dataclasses.replace(choice, kept=layouts[1]).write(tmp_path)
    kept = read_choice(tmp_path)
    assert kept is not None
    assert kept.layout == layouts[1]


def test_a_run_that_keeps_its_own_layout_is_refused_by_name(tmp_path: Path) -> None:
    for more, said in (
        ({"training": WRITTEN["training"] | {"accumulate": 2}}, "drop it, or write a layout"),
        ({"asynchronous": {}}, "workers that meet now and then are the replicas of dp, but dp=1"),
    ):
        written = {**WRITTEN, "folder": str(tmp_path), **more}
        with pytest.raises(ConfigError, match=said):
            choose(prepare(run_on_one_device(written), model=Decoder), written)
    (tmp_path / "layout.json").write_text("{}")
    with pytest.raises(ConfigError, match="search again with --search"):
        read_choice(tmp_path)


def candidates(*layouts: str) -> tuple[Candidate, ...]:
    return tuple(Candidate(layout=Layout.parse(text), predicted_s=0.01) for text in layouts)


@on_ranks(2, timeout_s=120)
def test_candidates_are_measured_in_steps_of_one_curve_and_the_fastest_is_kept(rank, tmp_path) -> None:
    written = {**WRITTEN, "layout": "dp=2", "folder": str(tmp_path / "run"), "auto": {"measure": 4, "steps": 2}}
    made = prepare(run_from({**written, "training": {**WRITTEN["training"], "steps": 32}}), model=Decoder)
    large = Candidate(layout=Layout.parse("tp=2"), predicted_s=0.01, peak_bytes=(1e15,))
    tried = (*candidates("dp=2", "pp=2,stages=[embed|nobody]"), large, *candidates("pp=2"))
    trained = train_on_rank(rank, dataclasses.replace(made, candidates=tried, told="layout: dp=2"))
    reference = alone(made, rank.rank)
    assert len(trained.losses) == 32
    assert off(trained.losses, reference.losses) <= CURVE
    events = [e for e in read_events(tmp_path / "run" / "events") if e.rank == rank.rank]
    kinds = [e.kind for e in events if e.kind in ("layout", "refused", "relayout", "measured", "start", "end")]
    back = kinds.count("relayout") - 1  # to dp=2, where it was the fastest
    assert kinds == ["layout", "start", "refused", "refused", "relayout", *["relayout"] * back, "measured", "end"]
    moved = next(e for e in events if e.kind == "relayout")
    ends = [Layout.parse(str(moved.data[name])) for name in ("source", "target")]
    assert (moved.step, ends) == (4, [Layout(dp=2), Layout(pp=2)])
    assert all(float(str(moved.data[name])) > 0 for name in ("seconds", "build_s", "move_s", "state_bytes"))
    told = next(e for e in events if e.kind == "measured").data
    seconds: dict[str, float] = told["layouts"]  # type: ignore[assignment]
    assert {Layout.parse(text) for text in seconds} == {Layout(dp=2), Layout(pp=2)}
    assert seconds[str(told["kept"])] <= 1.01 * min(seconds.values())
    unknown, too_large = (str(e.data["why"]) for e in events if e.kind == "refused")
    assert "nobody" in unknown
    assert "rank 0 cannot: LayoutError: a rank holds its part of a layout, but dp=1,pp=1,tp=2 needs " in too_large


@on_ranks(2, timeout_s=60)
def test_a_run_with_few_steps_left_measures_nothing_and_says_so(rank, tmp_path) -> None:
    written = {**WRITTEN, "layout": "dp=2", "folder": str(tmp_path / "run"), "auto": {"measure": 2, "steps": 4}}
    made = prepare(run_from({**written, "training": {**WRITTEN["training"], "steps": 3}}), model=Decoder)
    trained = train_on_rank(rank, dataclasses.replace(made, candidates=candidates("dp=2", "pp=2")))
    assert len(trained.losses) == 3
    told = [str(e.data["text"]) for e in read_events(tmp_path / "run" / "events") if e.kind == "measured"]
    assert told == ["layouts are not measured: 3 steps are left, which takes 24 or more"] * 2


def test_what_was_kept_is_what_a_resumed_run_has() -> None:
    first, second = candidates("dp=2", "pp=2")
    choice = Choice(candidates=(first, second), told="")
    assert choice.layout == first.layout
    assert dataclasses.replace(choice, kept=second.layout).layout == second.layout
