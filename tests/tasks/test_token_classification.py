"""Tagged sentences: read, aligned with tokens, scored as entities."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from shardwise.errors import ConfigError
from shardwise.tasks import Scored, TokenClassification, prepare_task, samples_at, task_from
from shardwise.tasks.tagged import Columns, read_conll

TRAIN = """# sent_id = 1
Ann B-PER
lives O
in O
New B-LOC
York I-LOC

-DOCSTART- O

# O
Bo B-PER
"""
DEV = "Bo B-PER\nsaw O\nYork B-LOC\n\nin O\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of CoNLL files, and a tokenizer that cuts words of capitals into two."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "An", "##n", "lives", "in", "New", "Yo", "##rk", "Bo", "saw", "#"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "en_train.conll").write_text(TRAIN)
    (tmp_path / "en_dev.conll").write_text(DEV)
    return tmp_path


def task(folder: Path, **more: object) -> TokenClassification:
    told = {"cache": str(folder / "cache"), "data": str(folder), "tokenizer": str(folder), "pad_to": 4, **more}
    made = task_from("token_classification", prepare_task("token_classification", told))
    assert isinstance(made, TokenClassification)
    return made


def test_the_first_token_of_a_word_has_its_label(data: Path) -> None:
    batch = task(data).samples([0, 1], "train")
    assert task(data).summary.labels == ("O", "B-LOC", "I-LOC", "B-PER")
    assert batch["input_ids"].tolist() == [[2, 4, 5, 6, 7, 8, 9, 10, 3, 0, 0, 0], [2, 13, 11, 3] + [0] * 8]
    assert batch["labels"].tolist()[0] == [-100, 3, -100, 0, 0, 1, 2, -100, -100, -100, -100, -100]
    assert batch["labels"].tolist()[1][:4] == [-100, 0, 3, -100]  # "# O" is a word and its tag, "# sent_id" is none
    assert batch["attention_mask"].sum(1).tolist() == [9, 4]
    assert task(data).samples([1], "train")["input_ids"].shape == (1, 4)  # padded to the longest


def test_a_part_of_a_batch_is_padded_as_the_batch_is(data: Path) -> None:
    made = task(data, pad_to=1)
    lengths = made.tokens["train"].lengths
    short, long = lengths.index(min(lengths)), lengths.index(max(lengths))
    assert lengths[short] < lengths[long]
    part = samples_at(made, [short], "train", seed=0, step=0, batch=[short, long])
    assert {tuple(tensor.shape) for tensor in part.values()} == {(1, lengths[long])}
    whole = made.samples([short, long], "train")
    assert all(torch.equal(part[name], tensor[:1]) for name, tensor in whole.items())
    (own,) = {tuple(tensor.shape) for tensor in made.samples([short], "train").values()}
    assert own == (1, lengths[short])


def test_entities_are_scored_and_a_word_behind_the_last_token_is_not_found(data: Path) -> None:
    made = task(data)
    assert isinstance(made, Scored)
    batch = made.samples([0, 1], "held_out")
    logits = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), 4).float()
    right = made.answers(logits, batch)["labels"]
    score = made.score({"labels": list(right)}, [0, 1], "held_out")
    assert score.figures == {"f1": 1.0, "precision": 1.0, "recall": 1.0, "accuracy": 1.0}
    assert "LOC" in score.report
    cut = task(data, max_tokens=4)  # [CLS] Bo saw [SEP]
    assert cut.summary.num_words_cut > 0
    batch = cut.samples([0], "held_out")
    logits = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), 4).float()
    figures = cut.score({"labels": list(cut.answers(logits, batch)["labels"])}, [0], "held_out").figures
    assert (figures["precision"], figures["recall"]) == (1.0, 0.5)


def test_the_head_has_a_label_for_every_tag_and_the_task_pickles_as_its_folder(data: Path) -> None:
    made = pickle.loads(pickle.dumps(task(data)))
    assert made.head().config["id2label"] == {0: "O", 1: "B-LOC", 2: "I-LOC", 3: "B-PER"}
    assert made.samples([1], "train")["labels"].tolist() == [[-100, 0, 3, -100]]
    assert sorted(made.indices(seed=0, step=0, global_batch=2)) == [0, 1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("Ann B-PER\nlives\n", r"bad.conll:2: a line has a word and a tag"),
        ("Ann PER\n", "is 'PER'"),
        ("\n", "no sentence"),
    ],
)
def test_a_line_without_a_tag_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.conll").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_conll(tmp_path / "bad.conll", Columns())


def test_a_split_of_several_files_is_to_be_named(data: Path) -> None:
    (data / "de_train.conll").write_text(TRAIN)
    with pytest.raises(ConfigError, match=r'name one: task.train = "de_train.conll"'):
        task(data)
    assert task(data, train="en_train.conll").num_samples("train") == 2


def test_a_folder_that_datasets_saved_gives_the_same_sentences(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)  # else bars leave a thread behind
    datasets.disable_progress_bars()
    tags = ["O", "B-LOC", "I-LOC", "B-PER"]
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(datasets.ClassLabel(names=tags))}
    )

    def split(rows: list[tuple[list[str], list[str]]]) -> object:
        told = {"tokens": [words for words, _ in rows], "ner_tags": [[tags.index(t) for t in own] for _, own in rows]}
        return datasets.Dataset.from_dict(told, features=features)

    first = (["Ann", "lives", "in", "New", "York"], ["B-PER", "O", "O", "B-LOC", "I-LOC"])
    saved = datasets.DatasetDict(
        {
            "train": split([first, (["#", "Bo"], ["O", "B-PER"])]),
            "validation": split([(["Bo", "saw", "York"], ["B-PER", "O", "B-LOC"]), (["in"], ["O"])]),
        }
    )
    saved.save_to_disk(str(data / "saved"))
    plain, other = task(data), task(data, data=str(data / "saved"))
    assert other.summary == plain.summary
