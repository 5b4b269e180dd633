"""A layout is a checked value that reads back what it writes."""

from __future__ import annotations

import pytest

from shardwise.errors import LayoutError
from shardwise.layout import Layout, StageRule

LAYOUTS = [
    Layout(),
    Layout(dp=2, pp=2, micro_batches=4),
    Layout(dp=2, pp=3, tp=4, seed=1),
    Layout(dp=3, pp=4, schedule="gpipe", stages=StageRule.PARAMETERS, seed=7),
    Layout(pp=3, stages=(("embed", "layers.0"), ("layers.1-2",), ("layers.3", "head"))),
    Layout(stages=(("whole",),)),
    Layout(pp=2, schedule="searched", chunks=2),
    Layout(dp=3, pp=2, shares=(4, 1, 1)),
    Layout(pp=2, schedule="schedules/mine.json", chunks=2, stages=(("a",), ("b",), ("c",), ("d",))),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_text_dictionary_and_json_read_back_as_written(layout) -> None:
    assert Layout.parse(str(layout)) == layout
    assert Layout.from_dict(layout.to_dict()) == layout
    assert Layout.from_json(layout.to_json()) == layout


def test_text_holds_only_what_was_chosen() -> None:
    assert str(Layout(dp=2, pp=2, micro_batches=4)) == "dp=2,pp=2,micro_batches=4"
    assert str(Layout(pp=2, stages=(("a", "b"), ("c",)))) == "dp=1,pp=2,stages=[a+b|c]"


def test_the_world_is_the_product_of_the_axes() -> None:
    assert Layout(dp=2, pp=3).world_size == 6


@pytest.mark.parametrize(
    "layout, num",
    [(Layout(pp=3), 3), (Layout(pp=3, schedule="searched", chunks=2), 6), (Layout(pp=3, schedule="mine.csv"), 3)],
    ids=str,
)
def test_stages_are_the_ranks_of_a_pipeline_times_those_of_a_rank(layout, num) -> None:
    assert layout.num_stages == num


@pytest.mark.parametrize(
    "layout, global_batch, num",
    [
        (Layout(), 64, 1),
        (Layout(pp=4), 64, 8),
        (Layout(dp=2, pp=4), 6, 3),  # capped: 3 samples a replica
        (Layout(dp=2, pp=4, micro_batches=2), 64, 2),
    ],
    ids=str,
)
def test_micro_batches_left_out_are_two_a_stage_and_at_most_one_a_sample(layout, global_batch, num) -> None:
    assert layout.num_micro_batches(global_batch) == num


def test_micro_batches_are_the_mean_of_shares() -> None:
    layout = Layout.parse("dp=2,shares=6:2")
    assert (layout.num_micro_batches(16), layout.most_micro_batches(16)) == (4, 6)
    assert Layout(dp=2, micro_batches=3).most_micro_batches(16) == 3
    with pytest.raises(LayoutError, match="7"):
        layout.most_micro_batches(7)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"dp": 0}, "dp=0; use dp=1"),
        ({"pp": 1.5}, "pp=1.5"),
        ({"tp": -1}, "tp=-1; use tp=1"),
        ({"micro_batches": 0}, "micro_batches=0"),
        ({"schedule": "2f2b"}, "one of naive, gpipe, 1f1b"),
        ({"schedule": "mine.yaml"}, r"or a file that ends with .json or .csv"),
        ({"chunks": 0}, "a rank owns 1 stage or more, but chunks=0"),
        ({"pp": 2, "schedule": "1f1b", "chunks": 2}, "made for 1 stages a rank, but chunks=2; write chunks=1"),
        ({"pp": 2, "schedule": "mine.json", "chunks": 2, "stages": [["a"], ["b"]]}, "× chunks=2 = 4; list 4 stages"),
        ({"stages": "weight"}, "balanced by cost, parameters, depth"),
        ({"stages": [["a"], ["b"]]}, "there are 2 and pp=1; write pp=2"),
        ({"pp": 2, "stages": [["a"], []]}, r"stages \[1\] of 2 have none"),
        ({"pp": 2, "stages": [["a"], ["b", "a"]]}, "'a' is listed 2 times"),
        ({"stages": [[1]]}, "lists of unit names"),
        ({"xp": 2}, "chunks, stages, seed, but got xp"),
        ({"dp": 2, "shares": [6, 2, 1]}, "dp=2 and shares=6:2:1; write for example shares=3:1"),
        ({"dp": 2, "shares": [6, 0]}, "1 or more, but dp=2 and shares=6:0"),
        ({"dp": 2, "shares": [5, 2]}, "are 7 for dp=2; use for example shares=10:4"),
        ({"dp": 2, "shares": "6:2", "micro_batches": 2}, "shares=6:2 are 8 and dp × micro_batches = 4; drop"),
        ({"fsdp": 2, "shares": [6, 2]}, "divide state or experts meet .* fsdp=2 and ep=1; use dp"),
        ({"dp": 2, "ep": 2, "shares": [6, 2]}, "divide state or experts meet .* fsdp=1 and ep=2; use dp"),
        ({"dp": 2, "pp": 2, "schedule": "searched", "shares": [3, 1]}, "shares=3:1 with one that is found"),
        ({"dp": 2, "shares": "six:2"}, "a share is a whole number, but got 'six'"),
        ({"dp": 2, "shares": 6}, "numbers with colons between, but got 6"),
    ],
)
def test_a_broken_rule_is_named_with_its_numbers_and_a_repair(fields, message) -> None:
    with pytest.raises(LayoutError, match=message):
        Layout.from_dict(fields)


@pytest.mark.parametrize("text", ["dp", "dp=2,dp=2", "dp=two", "dp=2;pp=2"])
def test_text_that_is_no_layout_is_refused(text) -> None:
    with pytest.raises(LayoutError, match="write for example"):
        Layout.parse(text)


@pytest.mark.parametrize("text", ["[1]", "{", '{"dp": "2"}'])
def test_json_that_is_no_layout_is_refused(text) -> None:
    with pytest.raises(LayoutError):
        Layout.from_json(text)


def test_too_small_a_batch_is_refused_with_the_largest_number_that_fits() -> None:
    with pytest.raises(LayoutError, match="7 samples are fewer .* = 8; use micro_batches=3"):
        Layout(dp=2, pp=2, micro_batches=4).num_micro_batches(7)
    with pytest.raises(LayoutError, match="dp=1 or less"):
        Layout(dp=2).num_micro_batches(1)


def test_divided_state_and_sequences_multiply_the_world() -> None:
    layout = Layout.parse("dp=2,fsdp=4,zero=2,cp=2,context=ulysses,recompute=512MiB,offload=both,unshard=step")
    assert (layout.num_replicas, layout.world_size) == (8, 16)
    assert Layout.parse(str(layout)) == layout == Layout.from_json(layout.to_json())
    assert layout.unshards_by_step
    assert Layout(pp=2, fsdp=2).unshards_by_step
    assert not Layout(fsdp=2).unshards_by_step


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fsdp": 2, "zero": 4}, "zero is 1"),
        ({"recompute": "some"}, "recompute is none, full, selective, or the bytes"),
        ({"cp": 2, "context": "star"}, "context is ring, ulysses"),
        ({"tp": 2, "cp": 2, "sequence_parallel": "on"}, "both deal out tokens"),
    ],
)
def test_what_divides_state_and_sequences_is_checked(fields, message) -> None:
    with pytest.raises(LayoutError, match=message):
        Layout(**fields)


def test_tokens_that_are_dealt_out_and_computed_again_stay_on_the_device() -> None:
    for two in ("offload=both", "sequence_parallel=on,offload=both", "sequence_parallel=on,recompute=full"):
        assert Layout.parse(f"tp=2,{two}").tp == 2
    for recompute in ("full", "selective", "64MiB"):
        with pytest.raises(LayoutError, match="two of the three"):
            Layout(tp=2, sequence_parallel=True, recompute=recompute, offload="activations")
