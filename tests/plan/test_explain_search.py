"""What a plan says of prices: every line adds up, verdicts have margins, lines stay within their columns."""

from __future__ import annotations

import re

import pytest

from shardwise.layout import Layout
from shardwise.plan.changes import changes_of
from shardwise.plan.explain_search import explain_ranked, ranking_table, verdict
from shardwise.plan.job import Job, PerParameter
from shardwise.plan.price_text import differences, memory_table, time_table
from shardwise.plan.pricer import Pricer
from shardwise.plan.space import Axes
from tests.plan.hand_works import cluster, device, limits, works

JOB = Job(global_batch=16, per_parameter=PerParameter.mixed())


def ranked(text: str, memory: float = 16e9):
    return Pricer(works(), cluster(kind=device(memory=memory)), JOB, limits())(Layout.parse(text), exact=True)


def test_time_of_every_place_adds_up_to_the_step() -> None:
    found = ranked("pp=4,dp=2,micro_batches=8")
    for lines in found.price.time:
        assert lines.total == pytest.approx(found.price.step_s, rel=1e-6)


def test_places_that_are_alike_share_a_column() -> None:
    found = ranked("pp=8,micro_batches=16")
    head = time_table(found.price)[0]
    assert "pp ranks" in head
    assert len(head.split("pp rank")) - 1 < 8
    assert memory_table(found.price)[-1].startswith("total")


def test_the_verdict_says_by_how_much_it_fits() -> None:
    text = verdict(ranked("pp=4,dp=2,micro_batches=8"))
    assert text.startswith("fits: ")
    assert re.search(r"\d+%\) free", text)


def test_the_verdict_says_how_much_is_too_much_and_of_what() -> None:
    text = verdict(ranked("dp=8,micro_batches=2", memory=2e9))
    assert text.startswith("out of memory: ")
    assert "too much; largest: " in text
    assert "GiB" in text


def test_differences_are_signed_and_name_their_lines() -> None:
    whole, again = ranked("pp=4,dp=2,micro_batches=8"), ranked("pp=4,dp=2,micro_batches=8,recompute=full")
    assert any(text.startswith("recompute +") for text in differences(whole.price, again.price))
    assert any(text.startswith("recompute −") for text in differences(again.price, whole.price))


def test_tables_stay_within_a_hundred_columns() -> None:
    found = [ranked("pp=8,micro_batches=16,schedule=zb-h1"), ranked("pp=4,fsdp=2,unshard=micro-batch,micro_batches=8")]
    told = [*ranking_table(found), *explain_ranked(found, 0, ()).splitlines()]
    assert max(map(len, told)) <= 100
    assert "pp=4,fsdp=2,unshard=micro-batch,micro_batches=8" in "".join(line.strip() for line in told)


def test_a_change_of_listed_stages_lets_the_rule_cut_them_again() -> None:
    pricer = Pricer(works(), cluster(), JOB, limits())
    layout = Layout(pp=2, dp=4, micro_batches=4, stages=(("layers.0-5",), ("layers.6-7",)))
    changes = changes_of(layout, pricer, Axes.of(limits(), cluster(), global_batch=16))
    deeper = next(change for change in changes if change.what == "pp 2→4")
    assert deeper.ranked is not None
    assert deeper.gain > 0


def test_what_changes_a_layout_with_shares_has_equal_ones() -> None:
    pricer = Pricer(works(), cluster(), JOB, limits())
    layout = Layout(dp=2, tp=4, shares=(3, 1))
    axes = Axes.of(limits(), cluster(), devices=8, global_batch=JOB.global_batch)
    told = [str(change) for change in changes_of(layout, pricer, axes)]
    assert any(text.startswith("micro-batch 4→2: ") for text in told)
    assert not [text for text in told if "shares" in text]
