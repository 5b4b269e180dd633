"""Token classification: a tag for every word of a sentence, such as the entities in it.

    word      Shaikh     Abdullah       al       -      Ani
    tag       B-PER      I-PER          I-PER    I-PER  I-PER
    token     sha ##ikh  abdullah       al       -      an ##i          and one before, one behind
    label     1   -100   2              2        2      2  -100         the first token of a word counts

Sentences of like length are trained on together, and padded to the longest of a batch. It knows how words become
tokens and what entities a model has found; it refuses to know models, ranks and steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from shardwise.errors import ConfigError
from shardwise.tasks.by_step import alike_indices
from shardwise.tasks.cache import content_key, filled_folder
from shardwise.tasks.entity_score import entity_score
from shardwise.tasks.head import ModelHead
from shardwise.tasks.ragged import Ragged
from shardwise.tasks.scored import Answers, Score
from shardwise.tasks.tagged import Columns, Sentence, read_tagged
from shardwise.tasks.task import (
    IGNORED_LABEL,
    SPLITS,
    Batch,
    Split,
    check_indices,
    class_loss,
    label_count,
    logits_of,
)
from shardwise.tasks.tokenizer import TextTokenizer, load_tokenizer

__all__ = ["FAMILY", "TaggedOptions", "TokenClassification"]

FAMILY = "AutoModelForTokenClassification"

_FORMAT = "tagged-1"  # a new number makes cached tokens of older versions unused
_SUMMARY_FILE = "tagged.json"
_OUTSIDE = "O"


@dataclass(frozen=True, kw_only=True)
class TaggedOptions:
    """What to read and how to make tokens of it.

    `data` as in `read_tagged`, with `train` and `held_out` files in it; `tokenizer` is a tokenizer.json or a folder
    that has one, the model's if not given. Sentences of more than `max_tokens` are cut: what is behind counts as not
    found. Lengths are padded to multiples of `pad_to`, as every length that is new is traced; `alike` batches are
    sorted by length together.
    """

    cache: str
    data: str
    tokenizer: str
    train: str = ""
    held_out: str = ""
    word_column: int = 0
    tag_column: int = -1
    words_feature: str = "tokens"
    tags_feature: str = "ner_tags"
    max_tokens: int = 128
    pad_to: int = 16
    alike: int = 32

    def __post_init__(self) -> None:
        if self.max_tokens < 3 or self.pad_to < 1 or self.alike < 1:
            raise ConfigError(
                "a sentence has a token between its two ends, and lengths and batches are counted from 1, but "
                f"max_tokens={self.max_tokens}, pad_to={self.pad_to}, alike={self.alike}; use 128, 16 and 32"
            )


@dataclass(frozen=True, kw_only=True)
class TaggedSummary:
    """What is known of prepared sentences."""

    fingerprint: str
    labels: tuple[str, ...]  # [label]: its tag
    vocabulary_size: int  # tokens
    padding: int  # the token that fills
    max_tokens: int
    num_train: int  # sentences
    num_held_out: int
    num_words: int  # of both
    num_words_cut: int  # that are behind the last token of their sentence


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenClassification:
    """A task over a prepared folder. Memory-mapped; pickles as its path."""

    counts: ClassVar[str] = "words"  # see `Counted`

    folder: Path
    summary: TaggedSummary
    pad_to: int
    alike: int
    tokens: Mapping[Split, Ragged]  # of every sentence
    labels: Mapping[Split, Ragged]  # as many
    tags: Mapping[Split, Ragged]  # of every word: 2 * label + whether one of its tokens is there

    @staticmethod
    def prepare(options: TaggedOptions) -> Path:
        """Read, tokenize and store; returns the folder to `open`. Raises ConfigError for data that are not tagged."""
        columns = Columns(
            word=options.word_column, tag=options.tag_column, words=options.words_feature, tags=options.tags_feature
        )
        files: dict[Split, str] = {"train": options.train, "held_out": options.held_out}
        sentences = read_tagged(Path(options.data).expanduser(), files, columns)
        tokenizer = load_tokenizer(Path(options.tokenizer).expanduser())
        read = [part for split in SPLITS for s in sentences[split] for part in (" ".join(s.words), " ".join(s.tags))]
        key = content_key([_FORMAT, tokenizer.to_json(), str(options.max_tokens), str(len(sentences["train"])), *read])
        filler = _filler(sentences, tokenizer, key, options.max_tokens)
        return filled_folder(Path(options.cache) / f"tagged-{key}", filler).resolve()

    @classmethod
    def open(cls, folder: Path, *, pad_to: int = 16, alike: int = 32) -> TokenClassification:
        """The task over a prepared folder. Raises ConfigError for a folder that `prepare` did not make."""
        try:
            told = json.loads((folder / _SUMMARY_FILE).read_text(encoding="utf-8"))
            summary = TaggedSummary(**told | {"labels": tuple(told["labels"])})
            tokens, labels, tags = (
                {split: Ragged.open(folder, f"{split}-{name}") for split in SPLITS}
                for name in ("tokens", "labels", "tags")
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"tagged sentences are opened from a folder that was prepared; {folder} holds none ({error}); prepare "
                "it first"
            ) from error
        return cls(folder=folder, summary=summary, pad_to=pad_to, alike=alike, tokens=tokens, labels=labels, tags=tags)

    @property
    def vocabulary_size(self) -> int:
        """Rows that a model needs."""
        return self.summary.vocabulary_size

    @property
    def sequence_length(self) -> int:
        """Tokens of the longest sample, padded."""
        return -(-self.summary.max_tokens // self.pad_to) * self.pad_to

    def num_samples(self, split: Split) -> int:
        """Sentences of a split."""
        return self.tokens[split].num_rows

    def head(self) -> ModelHead:
        """A label for every tag."""
        names = dict(enumerate(self.summary.labels))
        return ModelHead(family=FAMILY, config={"id2label": names, "label2id": {tag: i for i, tag in names.items()}})

    def indices(self, *, seed: int, step: int, global_batch: int) -> tuple[int, ...]:
        """Sentences of like length."""
        lengths = self.tokens["train"].lengths
        return alike_indices(lengths, seed=seed, step=step, global_batch=global_batch, num_batches=self.alike)

    def samples(self, indices: Sequence[int], split: Split) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels`, int64 (len(indices), tokens of the longest, padded)."""
        return self.padded(indices, split, batch=indices)

    def padded(self, indices: Sequence[int], split: Split, *, batch: Sequence[int]) -> dict[str, Tensor]:
        """Like `samples`, padded to the longest of `batch`."""
        check_indices([*indices, *batch], num_samples=self.num_samples(split), split=split)
        tokens = [self.tokens[split].row(i) for i in indices]
        lengths = self.tokens[split].lengths
        longest = -(-max((lengths[i] for i in batch), default=1) // self.pad_to) * self.pad_to
        ids = np.full((len(indices), longest), self.summary.padding, dtype=np.int64)  # (batch, tokens)
        mask, labels = np.zeros_like(ids), np.full_like(ids, IGNORED_LABEL)
        for place, (index, row) in enumerate(zip(indices, tokens, strict=True)):
            ids[place, : len(row)], mask[place, : len(row)] = row, 1
            labels[place, : len(row)] = self.labels[split].row(index)
        made = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in made.items()}

    def loss(self, outputs: object, batch: Batch) -> Tensor:
        """The model's own loss, else cross entropy of its logits (batch, tokens, labels); nats per word, scalar."""
        return class_loss(outputs, batch)

    def weight(self, batch: Batch) -> float:
        """Words of which the first token is there."""
        return label_count(batch)

    def metrics(self, loss: float) -> dict[str, float]:
        """None: figures come from `score`."""
        return {}

    def answers(self, outputs: object, batch: Batch) -> dict[str, Tensor]:
        """`labels`: the best label of each word's first token, -1 elsewhere, int16 (batch, tokens)."""
        best = logits_of(outputs).argmax(-1)
        counted = batch["labels"].to(best.device) != IGNORED_LABEL
        return {"labels": torch.where(counted, best, -1).to(torch.int16)}

    def score(self, answers: Answers, indices: Sequence[int], split: Split) -> Score:
        """Precision, recall and F1 of entities, and a report per class (seqeval)."""
        true: list[list[str]] = []
        found: list[list[str]] = []
        names = self.summary.labels
        for index, row in zip(indices, answers["labels"], strict=True):
            words = self.tags[split].row(index).astype(np.int64)
            guesses = iter(row[row >= 0].tolist())
            true.append([names[word // 2] for word in words])
            found.append([names[next(guesses)] if word % 2 else _OUTSIDE for word in words])
        return entity_score(true, found)

    def __reduce__(self) -> tuple[Callable[[str, int, int], TokenClassification], tuple[str, int, int]]:
        return _reopened, (str(self.folder), self.pad_to, self.alike)


def _reopened(folder: str, pad_to: int, alike: int) -> TokenClassification:
    return TokenClassification.open(Path(folder), pad_to=pad_to, alike=alike)


def _filler(
    sentences: Mapping[Split, Sequence[Sentence]], tokenizer: TextTokenizer, key: str, max_tokens: int
) -> Callable[[Path], None]:
    """A function that writes tokens, labels and tags of both splits into an empty folder."""
    tags = {tag for split in SPLITS for sentence in sentences[split] for tag in sentence.tags} - {_OUTSIDE}
    labels = (_OUTSIDE, *sorted(tags, key=lambda tag: (tag[2:], tag)))
    numbers = {tag: number for number, tag in enumerate(labels)}

    def fill(folder: Path) -> None:
        live, words, cut = tokenizer.live, 0, 0
        live.enable_truncation(max_tokens)
        for split in SPLITS:
            encodings = live.encode_batch([list(s.words) for s in sentences[split]], is_pretokenized=True)
            rows: dict[str, list[list[int]]] = {"tokens": [], "labels": [], "tags": []}
            for sentence, encoding in zip(sentences[split], encodings, strict=True):
                own = [numbers[tag] for tag in sentence.tags]
                seen = set(encoding.word_ids) - {None}
                rows["tokens"].append(encoding.ids)
                rows["labels"].append(_labels(encoding.word_ids, own))
                rows["tags"].append([2 * label + (word in seen) for word, label in enumerate(own)])
                words, cut = words + len(own), cut + len(own) - len(seen)
            for name, values in rows.items():
                Ragged.of(values, dtype=np.int16 if name != "tokens" else np.int32).save(folder, f"{split}-{name}")
        live.no_truncation()
        summary = TaggedSummary(
            fingerprint=key,
            labels=labels,
            vocabulary_size=tokenizer.vocabulary_size,
            padding=_padding(tokenizer),
            max_tokens=max_tokens,
            num_train=len(sentences["train"]),
            num_held_out=len(sentences["held_out"]),
            num_words=words,
            num_words_cut=cut,
        )
        (folder / _SUMMARY_FILE).write_text(json.dumps(asdict(summary), indent=1), encoding="utf-8")

    return fill


def _labels(word_ids: Sequence[int | None], own: Sequence[int]) -> list[int]:
    """The label of a word for its first token, IGNORED_LABEL for others."""
    before: int | None = None
    labels: list[int] = []
    for word in word_ids:
        labels.append(IGNORED_LABEL if word is None or word == before else own[word])
        before = word
    return labels


def _padding(tokenizer: TextTokenizer) -> int:
    """The usual padding token, else token 0: what is masked may be anything."""
    found = (tokenizer.live.token_to_id(name) for name in ("[PAD]", "<pad>", "<|pad|>"))
    return next((token for token in found if token is not None), 0)
