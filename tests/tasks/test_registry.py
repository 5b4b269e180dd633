"""Tasks are made from a name and options, and wrong ones are refused by name."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from shardwise.errors import ConfigError
from shardwise.tasks import LanguageModelling, RandomTokens, prepare_task, task_from


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("some words to train on\n" * 50)
    return str(tmp_path / "text.txt")


def test_a_corpus_is_prepared_once_and_opened_from_what_that_returned(text: str, tmp_path: Path) -> None:
    options = {
        "sources": [text],
        "cache": str(tmp_path / "cache"),
        "sequence_length": 8,
        "vocabulary_size": 260,
        "held_out_fraction": 0.1,
    }
    prepared = json.loads(json.dumps(prepare_task("language_modelling", options)))
    task = task_from("language_modelling", prepared)
    assert isinstance(task, LanguageModelling)
    assert task.samples([0], "held_out")["input_ids"].shape == (1, 8)


def test_a_corpus_that_is_not_prepared_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="prepare_task"):
        task_from("language_modelling", {"sources": text, "cache": "cache"})


def test_random_tokens_need_no_preparation() -> None:
    options = {"vocabulary_size": 11, "seed": 4}
    task = task_from("random_tokens", prepare_task("random_tokens", options))
    assert task == task_from("random_tokens", options) == RandomTokens(vocabulary_size=11, seed=4)


def test_a_task_of_ones_own_is_named_by_module_and_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ModuleType("own_tasks")
    own.make = lambda size: RandomTokens(vocabulary_size=size)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_tasks", own)
    options = prepare_task("own_tasks:make", {"size": 5})
    assert task_from("own_tasks:make", options) == RandomTokens(vocabulary_size=5)
    for wrong in ("own_tasks:absent", "absent_module:make"):
        with pytest.raises(ConfigError, match=wrong):
            task_from(wrong, {})


def test_an_unknown_kind_is_an_error_that_lists_the_known_ones() -> None:
    for call in (prepare_task, task_from):
        with pytest.raises(ConfigError, match="language_modelling.*random_tokens.*'vision'"):
            call("vision", {})


@pytest.mark.parametrize(
    "kind, options, said",
    [
        ("random_tokens", {"vocabulary": 5}, "task.vocabulary is no option; write vocabulary_size"),
        ("random_tokens", {"seed": "many"}, "task.seed is a whole number, but got 'many'"),
        ("random_tokens", {"sequence_length": 1}, "sequence_length=1"),
        ("language_modelling", {"sources": "stdlib"}, "task.cache is missing; add it"),
    ],
)
def test_a_wrong_option_is_refused_by_name(kind: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        prepare_task(kind, options)
