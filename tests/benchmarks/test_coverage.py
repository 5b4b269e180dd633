"""The shrinker makes coherent small configs, inputs fit them, and the figures count every architecture once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from benchmarks.coverage.case import NotTrainedError, architectures, find_case, pattern_loss
from benchmarks.coverage.guess import Guess, repaired
from benchmarks.coverage.inputs import batch_of
from benchmarks.coverage.layouts import verify_stages
from benchmarks.coverage.names import Meaning, meaning_of
from benchmarks.coverage.run import _merged, _missing, main
from benchmarks.coverage.shrink import POLICIES, shrunk
from benchmarks.coverage.table import figures, markdown

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


@pytest.mark.parametrize("architecture", ["vit"])
def test_a_case_trains_and_two_stages_are_one_device(architecture: str) -> None:
    outcome = verify_stages(find_case(architecture))
    assert outcome.proven, outcome.reason
    assert len(outcome.stages) == 2


def test_what_has_no_model_says_so() -> None:
    assert len(architectures()) > 300
    with pytest.raises(NotTrainedError, match="no model class takes this config"):
        find_case("sam_prompt_encoder")


def row(name: str, *, trained: bool = True, proven: bool = True, wrong: bool = False) -> dict[str, Any]:
    outcome = {"proven": proven, "wrong": wrong, "units": 4, "stages": [2, 2], "gradient_error": 0.0, "reason": "why|"}
    layouts = {"pp2": outcome, "tp2": None, "tp2_pp2": None} if trained else {}
    about = {"class": "C", "own_loss": True, "parameters": 10, "seconds": 1.0, "reason": "no inputs"}
    return {"architecture": name, "trained": trained, "layouts": layouts, **about}


def test_figures_count_every_architecture_once() -> None:
    rows = [row("a"), row("b", proven=False), row("c", proven=False, wrong=True), row("d", trained=False)]
    assert figures(rows) == {"trained": 3, "pp2": 1, "tp2": None, "tp2_pp2": None, "wrong": 1, "misses": ["b", "c"]}


def test_the_page_names_every_miss_and_every_architecture_that_does_not_train() -> None:
    page = markdown([row("a"), row("b", proven=False), row("d", trained=False)])
    assert "| b | pp2 | why\\| |" in page
    assert "| d | no inputs |" in page
    assert "Of 3 architectures 2 train" in page


def test_a_layout_that_is_new_joins_what_is_known() -> None:
    known, new = row("a"), row("a")
    new["layouts"] = {"pp2": None, "tp2": {"proven": True}, "tp2_pp2": None}
    assert _missing(known, ["pp2", "tp2"]) == ("tp2",)
    assert _missing(row("b", trained=False), ["tp2"]) == ()
    assert {name: bool(one) for name, one in _merged(known, new)["layouts"].items()} == {
        "pp2": True,
        "tp2": True,
        "tp2_pp2": False,
    }


def test_known_results_are_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps(row("a")) + "\n", encoding="utf-8")
    main(["--only", "a", "--results", str(results), "--layouts", "pp2"])
    assert json.loads(capsys.readouterr().out)["pp2"] == 1
