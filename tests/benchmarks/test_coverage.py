"""The shrinker makes coherent small configs, inputs fit them, and the figures count every architecture once."""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf

from benchmarks.coverage import sharded
from benchmarks.coverage.case import (
    Case,
    NotTrainedError,
    _fill,
    _marked_memory,
    architectures,
    find_case,
    pattern_loss,
)
from benchmarks.coverage.guess import Guess, repaired
from benchmarks.coverage.inputs import batch_of
from benchmarks.coverage.kinds import weights_by_kind
from benchmarks.coverage.layouts import layouts
from benchmarks.coverage.names import Meaning, meaning_of
from benchmarks.coverage.outcome import followed_share
from benchmarks.coverage.ranks import RankError, on_forked_ranks
from benchmarks.coverage.run import LAYOUTS, _asked_of, _failed, _merged, _processor_seconds, _read, _record, main
from benchmarks.coverage.sharded import Shards
from benchmarks.coverage.shrink import POLICIES, shrunk
from benchmarks.coverage.staged import Alone
from benchmarks.coverage.table import figures, markdown
from shardwise.describe.tensor import TensorPlan
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.parallel.tensor.processes import ProcessTensorGroup
from shardwise.verify.rounding import DOUBT

TARGETS, SIXTEENTH = POLICIES[0], POLICIES[1]


@pytest.mark.parametrize(
    ("name", "value", "meaning"),
    [
        ("hidden_size", 4096, Meaning.WIDTH),
        ("num_hidden_layers", 32, Meaning.LAYERS),
        ("depths", [2, 2, 6, 2], Meaning.DEPTHS),
        ("fullatt_block_indexes", [7, 15], Meaning.LAYER_INDEX),
        ("vocab_size", 32000, Meaning.VOCABULARY),
        ("type_vocab_size", 2, Meaning.OTHER),
        ("image_token_id", 151655, Meaning.TOKEN),
        ("attention_dropout", 0.1, Meaning.CHANCE),
        ("rms_norm_eps", 1e-6, Meaning.OTHER),
        ("patch_size", 14, Meaning.OTHER),
    ],
)
def test_names_say_what_a_number_counts(name: str, value: object, meaning: Meaning) -> None:
    assert meaning_of(name, value) is meaning


def test_a_small_config_keeps_every_kind_of_layer() -> None:
    default = hf.Gemma3TextConfig()
    small = shrunk(default, TARGETS)
    assert set(small.layer_types) == set(default.layer_types)
    assert len(small.layer_types) == small.num_hidden_layers <= 4


def test_the_widths_of_a_config_tree_fit_one_another() -> None:
    small = shrunk(hf.Qwen2VLConfig(), TARGETS)
    assert small.vision_config.hidden_size == small.text_config.hidden_size
    assert sum(small.text_config.rope_parameters["mrope_section"]) == small.text_config.hidden_size // 4 // 2


def test_a_token_has_the_same_new_number_wherever_it_is_named() -> None:
    small = shrunk(hf.LlavaConfig(image_token_index=32000), SIXTEENTH)
    assert small.image_token_index < small.text_config.vocab_size == SIXTEENTH.vocabulary


def test_nothing_is_drawn_at_random() -> None:
    small = shrunk(hf.Wav2Vec2Config(), TARGETS)
    assert small.layerdrop == small.hidden_dropout == small.mask_time_prob == 0


def test_divided_widths_keep_their_ratios() -> None:
    small = shrunk(hf.LlamaConfig(hidden_size=4096, intermediate_size=12288, num_attention_heads=32), SIXTEENTH)
    assert (small.hidden_size, small.intermediate_size, small.head_dim) == (256, 768, 8)


def test_an_error_that_counts_places_makes_a_guess_with_as_many() -> None:
    model = hf.LlavaForConditionalGeneration(shrunk(hf.LlavaConfig(), TARGETS))
    guess = Guess(labels=True, media=True, sizes=False)
    better = repaired(guess, "Image features and image tokens do not match, tokens: 0, features: 2048", model, {})
    assert better is not None
    assert dict(better.slots) == {"image": 16}  # 2048 = 2 samples, 16 places, 64 wide
    ids = batch_of(model, better)["input_ids"]
    assert (ids == model.config.image_token_index).sum() == 32


def test_an_error_that_names_an_argument_makes_a_guess_with_it() -> None:
    model = hf.BertModel(shrunk(hf.BertConfig(), TARGETS))
    better = repaired(Guess(labels=False, media=True), "you have to give token_type_ids", model, {})
    assert better is not None
    assert better.more == ("token_type_ids",)
    assert repaired(Guess(labels=False, media=True), "a matrix is singular", model, {}) is None


def test_the_pattern_loss_has_a_gradient_behind_a_layer_norm() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    torch.autograd.backward([pattern_loss((torch.nn.functional.layer_norm(x, (8,)), None, torch.arange(3)), {})])
    assert x.grad is not None
    assert x.grad.norm() > 1e-2


@pytest.fixture(scope="module")
def bert() -> Case:
    return find_case("bert")


def test_a_case_trains_and_every_layout_is_one_device(bert: Case) -> None:
    outcomes = {name: verify() for name, verify in layouts(bert).items()}
    assert {name: outcome.reason for name, outcome in outcomes.items()} == {"pp2": "", "tp2": "", "tp2_pp2": ""}
    assert all(outcome.proven for outcome in outcomes.values())
    assert len(outcomes["pp2"].stages) == len(outcomes["tp2_pp2"].stages) == 2
    assert outcomes["tp2"].sharded_share == 1.0  # and the embedding is tied to the head
    assert outcomes["tp2"].gradient_error  # sums in another order: something was divided


@pytest.mark.parametrize("forgotten", ["reduces", "copies"])
def test_a_plan_with_a_fault_is_seen_to_differ(bert: Case, monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    def with_fault(*args: Any, **kwargs: Any) -> TensorPlan:
        plan = plan_tensor(*args, **kwargs)
        last = max(name for name in plan.units if "layer" in name)
        without: dict[str, Any] = {forgotten: ()}
        return dataclasses.replace(plan, units={last: dataclasses.replace(plan.units[last], **without)})

    monkeypatch.setattr(sharded, "plan_tensor", with_fault)
    outcome = Shards(Alone(bert)).verify(num_stages=1)
    assert outcome.wrong
    assert not outcome.proven
    assert "in float64" in outcome.reason


def test_precision_that_the_layout_alone_loses_is_no_rounding(bert: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = ProcessTensorGroup.all_reduce

    def rounded(self: ProcessTensorGroup, tensor: torch.Tensor) -> torch.Tensor:
        total = exact(self, tensor)
        return total.bfloat16().float() if total.dtype == torch.float32 else total

    monkeypatch.setattr(ProcessTensorGroup, "all_reduce", rounded)
    outcome = Shards(Alone(bert)).verify(num_stages=1)
    assert outcome.wrong
    assert "times as far from float64 as one device" in outcome.reason


@pytest.mark.parametrize("shaken, ratio", [(0.0, 1e3), (1e-3, 1.0), (1e-5, 1e2)])
def test_a_lucky_run_of_one_device_is_asked_again_with_weights_other_in_their_last_bit(
    shaken: float, ratio: float
) -> None:
    precise = torch.linspace(1.0, 2.0, 8)
    one_device, layout = precise * (1 + 1e-6), precise * (1 + 1e-3)
    others = [(1.0, {"w": precise * (1 + shaken)})]
    _, where, found = sharded._farthest((1.0, {"w": layout}), (1.0, {"w": one_device}), (1.0, {"w": precise}), others)
    assert where == "w"
    assert found == pytest.approx(ratio, rel=0.2)


def test_gradients_that_are_lost_beside_one_are_not_followed() -> None:
    gradients = {"large": torch.full((10,), 1e6), "small": torch.full((30,), 1e-6), "none": None}
    assert followed_share(gradients) == 0.25
    assert followed_share({**gradients, "large": torch.full((10,), 1.0)}) == 1.0


class LeavesMemory(torch.nn.Module):
    """Nobody writes one of its parameters and one of its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.written = torch.nn.Parameter(torch.ones(3))
        self.unwritten = torch.nn.Parameter(torch.empty(64))
        self.register_buffer("forgotten", torch.empty(4))


def test_what_a_class_leaves_unwritten_is_no_matter_of_what_was_in_memory() -> None:
    with _marked_memory():
        model = LeavesMemory()
        _fill(model)
    assert not torch.are_deterministic_algorithms_enabled()
    assert model.written.tolist() == [1, 1, 1]
    assert 0.005 < float(model.unwritten.detach().std()) < 0.04
    assert not model.forgotten.any()


def test_a_rank_that_raises_ends_all_at_once() -> None:
    def work(group: dist.ProcessGroup) -> int:
        if group.rank() == 1:
            raise ValueError("no shards left")
        dist.barrier(group)
        return 0

    with pytest.raises(RankError, match="ValueError: no shards left"):
        on_forked_ranks(2, work, seconds=20.0)


def test_ranks_that_never_answer_end_at_the_deadline() -> None:
    with pytest.raises(RankError, match="no answer of rank 0 within 1 s"):
        on_forked_ranks(1, lambda group: time.sleep(60), seconds=1.0)


def test_what_a_model_is_made_of_is_read_from_its_weights() -> None:
    with torch.device("meta"):
        llama = weights_by_kind(hf.LlamaForCausalLM(shrunk(hf.LlamaConfig(), TARGETS)))
        resnet = weights_by_kind(hf.ResNetForImageClassification(shrunk(hf.ResNetConfig(), TARGETS)))
        mamba = weights_by_kind(hf.MambaForCausalLM(shrunk(hf.MambaConfig(), TARGETS)))
    assert llama["matmul"] > 0
    assert llama["convolution"] == llama["recurrence"] == 0
    assert resnet["convolution"] > 10 * resnet["matmul"]  # its head stands in a list of modules
    assert mamba["recurrence"] > 0
    assert mamba["matmul"] == 0


def test_what_has_no_model_says_so() -> None:
    assert len(architectures()) > 300
    with pytest.raises(NotTrainedError, match="no model class takes this config"):
        find_case("sam_prompt_encoder")


def row(
    name: str, *, trained: bool = True, proven: bool = True, wrong: bool = False, share: float = 1.0, convolved: int = 0
) -> dict[str, Any]:
    stages = {"proven": proven, "wrong": wrong, "units": 4, "stages": [2, 2], "gradient_error": 0.0, "reason": "why|"}
    shards = {**stages, "proven": True, "wrong": False, "sharded_share": share, "whole": "7 heads", "reason": ""}
    layouts = {"pp2": stages, "tp2": shards, "tp2_pp2": None} if trained else {}
    weights = {"matmul": 10, "convolution": convolved, "recurrence": 0}
    about = {"class": "C", "own_loss": True, "parameters": 10, "seconds": 1.0, "reason": "no inputs"}
    return {"architecture": name, "trained": trained, "layouts": layouts, "weights": weights, **about}


def test_figures_count_every_architecture_once() -> None:
    rows = [
        row("a"),
        row("b", proven=False),
        row("c", proven=False, wrong=True),
        row("d", trained=False),
        row("e", share=0.5),
        row("f", share=0.5, convolved=90),
    ]
    assert figures(rows) == {
        "trained": 5,
        "pp2": 3,
        "pp2_of": 5,
        "tp2": 3,
        "tp2_of": 4,
        "tp2_pp2": None,
        "tp2_pp2_of": 0,
        "tp2_others": 1,
        "tp2_others_of": 1,
        "tp2_others_median_share": 0.5,
        "wrong": 1,
        "misses": ["b", "c", "e"],
    }


def test_the_page_names_every_miss_and_every_architecture_that_does_not_train() -> None:
    rows = [row("a"), row("b", proven=False), row("d", trained=False), row("e", share=0.5), row("f", convolved=90)]
    rows[0]["layouts"]["pp2"]["reference"] = "one stage with keyed draws: the model draws random numbers"
    rows[0]["layouts"]["tp2"]["followed"] = 0.25
    page = markdown(rows)
    assert "would show beside the rest: a (25 %)." in page
    assert "held against one stage that draws the same: a." in page
    assert f"by {DOUBT:g} at most" in page
    assert "| b | pp2 | why\\| |" in page
    assert "| e | tp2 | 50 % divided: 7 heads |" in page
    assert "| f | 10 % matmul, 90 % convolution | 100 % | 7 heads |" in page
    assert "| d | no inputs |" in page
    assert "Of 5 architectures 4 train" in page


def test_a_layout_that_is_new_joins_what_is_known() -> None:
    known, new = row("a"), row("a")
    known["layouts"]["tp2"] = None
    new["layouts"] = {"pp2": None, "tp2": {"proven": True}, "tp2_pp2": None}
    assert asked(known, layouts=["pp2", "tp2"]) == ("tp2",)
    assert asked(row("b", trained=False)) == ()
    assert asked(None) == ("pp2", "tp2", "tp2_pp2")
    assert asked(known, again=True) == ("pp2", "tp2", "tp2_pp2")
    merged = _merged(known, new)["layouts"]
    assert {name: bool(one) for name, one in merged.items()} == {"pp2": True, "tp2": True, "tp2_pp2": False}
    assert _merged(known, row("a", trained=False))["trained"] is False  # what it could before is no result of this code


def asked(known: dict[str, Any] | None, **options: Any) -> tuple[str, ...]:
    given = {"layouts": LAYOUTS, "again": False, "current": False, "misses": False, **options}
    return _asked_of(known, argparse.Namespace(**given), "c2")


def test_what_the_code_of_another_commit_has_answered_is_run_again() -> None:
    known = row("a")
    known["layouts"] = {name: {**known["layouts"]["pp2"], "commit": "c2"} for name in LAYOUTS}
    known["layouts"]["tp2"]["commit"] = "c1"
    assert asked(known, current=True) == ("tp2",)
    assert asked({**row("b", trained=False), "commit": "c1"}, current=True) == LAYOUTS
    assert asked({**row("b", trained=False), "commit": "c2"}, current=True) == ()


def recorded(results: Path, names: Sequence[str]) -> None:
    for name in names:
        _record(results, row(name))


def test_two_runs_write_into_one_file_and_leave_one_line_an_architecture(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(row("x", share=share)) + "\n" for share in (0.1, 0.2)), encoding="utf-8")
    processes = multiprocessing.get_context("fork")
    runs = [
        processes.Process(target=recorded, args=(results, [f"{which}{number}" for number in range(25)]))
        for which in "ab"
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join(30)
    known = _read(results)
    assert len(known) == len(results.read_text(encoding="utf-8").splitlines()) == 51
    assert known["x"]["layouts"]["tp2"]["sharded_share"] == 0.2


def test_a_process_that_waits_takes_no_time_of_a_processor() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as waits:
        before = _processor_seconds(waits.pid)
        time.sleep(0.2)
        assert _processor_seconds(waits.pid) - before < 0.15
        waits.kill()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True) as works:
        end = time.monotonic() + 20
        while _processor_seconds(works.pid) < 0.1 and time.monotonic() < end:
            time.sleep(0.02)
        works.kill()
    assert time.monotonic() < end


def test_a_layout_without_an_answer_says_why_and_the_next_that_it_was_not_begun() -> None:
    failed = _failed(
        {"trained": True, "layouts": {"pp2": {"proven": True}}}, ["pp2", "tp2", "tp2_pp2"], "no answer", "c0"
    )
    reasons = {name: outcome.get("reason") for name, outcome in failed["layouts"].items()}
    assert reasons == {"pp2": None, "tp2": "no answer", "tp2_pp2": "not begun: no answer before"}
    assert {outcome["commit"] for outcome in failed["layouts"].values()} == {"c0"}
    assert _failed({"trained": False, "layouts": {}}, ["pp2"], "died", "c0")["commit"] == "c0"


def test_known_results_are_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps(row("a")) + "\n", encoding="utf-8")
    main(["--only", "a", "--results", str(results), "--layouts", "pp2", "tp2"])
    assert json.loads(capsys.readouterr().out)["pp2"] == 1
