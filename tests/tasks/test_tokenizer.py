"""A trained tokenizer loses nothing and is trained once; a loaded one is used as it is."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from shardwise.errors import ConfigError
from shardwise.tasks import tokenizer as module
from shardwise.tasks.tokenizer import END_OF_TEXT, TextTokenizer, load_tokenizer, train_tokenizer

DOCUMENTS = [
    "def add(a, b):\n    return a + b\n" * 20,
    "",
    "snow ❄ 雪 \x00 \t\t  \n" * 5,
    f"the text {END_OF_TEXT} is only text\n",
    "one long line without an end " * 40,
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train_tokenizer(DOCUMENTS, vocabulary_size=300, cache=tmp_path_factory.mktemp("cache"))


def tokens_of(tokenizer: TextTokenizer, documents: list[str]) -> list[int]:
    return [token for array in tokenizer.encode(documents) for token in array.tolist()]


def documents_in(tokenizer: TextTokenizer, tokens: list[int]) -> list[str]:
    documents: list[list[int]] = [[]]
    for token in tokens:
        if token == tokenizer.end_of_text:
            documents.append([])
        else:
            documents[-1].append(token)
    assert documents.pop() == []  # the last document is ended too
    return [tokenizer.live.decode(part, skip_special_tokens=False) for part in documents]


def test_every_document_comes_back_and_ends_once(trained: TextTokenizer) -> None:
    assert documents_in(trained, tokens_of(trained, DOCUMENTS)) == DOCUMENTS


@pytest.mark.parametrize("piece_chars, batch_chars", [(7, 20), (64, 64), (1, 10**6)])
def test_long_documents_are_encoded_in_pieces_without_loss(
    trained: TextTokenizer, monkeypatch: pytest.MonkeyPatch, piece_chars: int, batch_chars: int
) -> None:
    monkeypatch.setattr(module, "_PIECE_CHARS", piece_chars)
    monkeypatch.setattr(module, "_BATCH_CHARS", batch_chars)
    ascii_documents = [text for text in DOCUMENTS if text.isascii()]
    assert documents_in(trained, tokens_of(trained, ascii_documents)) == ascii_documents


def test_the_vocabulary_is_as_asked_and_merges_something(trained: TextTokenizer) -> None:
    assert trained.vocabulary_size == 300
    assert trained.dtype == np.uint16
    assert len(tokens_of(trained, DOCUMENTS[:1])) < len(DOCUMENTS[0]) / 2


def test_training_is_deterministic_and_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train_tokenizer(DOCUMENTS, vocabulary_size=280, cache=tmp_path / "a")
    second = train_tokenizer(DOCUMENTS, vocabulary_size=280, cache=tmp_path / "b")
    assert first.to_json() == second.to_json()

    def no_training(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(module, "_train", no_training)
    assert train_tokenizer(DOCUMENTS, vocabulary_size=280, cache=tmp_path / "a").to_json() == first.to_json()
    for other in (
        {"documents": DOCUMENTS[1:], "vocabulary_size": 280},
        {"documents": DOCUMENTS, "vocabulary_size": 281},
    ):
        with pytest.raises(AssertionError, match="trained again"):
            train_tokenizer(**other, cache=tmp_path / "a")


def saved(folder: Path, tokenizer: TextTokenizer, config: object = None) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_tokenizer_is_loaded_from_a_file_or_a_folder(tmp_path: Path, trained: TextTokenizer) -> None:
    folder = saved(tmp_path / "checkpoint", trained)
    for source in (folder, folder / "tokenizer.json"):
        assert tokens_of(load_tokenizer(source), DOCUMENTS) == tokens_of(trained, DOCUMENTS)


def test_a_loaded_tokenizer_neither_truncates_nor_pads(tmp_path: Path, trained: TextTokenizer) -> None:
    folder = saved(tmp_path / "checkpoint", trained)
    changed = load_tokenizer(folder).live
    changed.enable_truncation(max_length=3)
    changed.enable_padding(length=2000)
    (folder / "tokenizer.json").write_text(changed.to_str())
    assert tokens_of(load_tokenizer(folder), DOCUMENTS) == tokens_of(trained, DOCUMENTS)


@pytest.mark.parametrize("token", ["a", {"content": "a"}])
def test_the_end_of_text_is_the_one_the_checkpoint_names(tmp_path: Path, trained: TextTokenizer, token: object) -> None:
    folder = saved(tmp_path / "checkpoint", trained, {"eos_token": token})
    vocabulary = trained.live.get_vocab()
    assert load_tokenizer(folder).end_of_text == vocabulary["a"]
    assert load_tokenizer(folder, end_of_text="b").end_of_text == vocabulary["b"]


def test_an_end_of_text_that_is_no_token_is_refused(tmp_path: Path, trained: TextTokenizer) -> None:
    folder = saved(tmp_path / "checkpoint", trained)
    with pytest.raises(ConfigError, match="<nothing>"):
        load_tokenizer(folder, end_of_text="<nothing>")


def test_a_missing_or_damaged_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocabulary_size=256"):
        train_tokenizer(DOCUMENTS, vocabulary_size=256, cache=tmp_path)


def test_without_the_library_the_error_gives_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install 'shardwise\[hf\]'"):
        train_tokenizer(DOCUMENTS, vocabulary_size=300, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []
