"""Next-token prediction over a text corpus.

    sources -> documents -> train and held out -> tokens on disk      `prepare`: slow, once, in one process
                                                   tokens -> samples  `open`: cheap, in every rank, reads only

It knows how corpus, tokenizer and packing fit together; it refuses to know models, ranks and steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import Tensor

from shardwise.errors import ConfigError
from shardwise.tasks.cache import content_key, filled_folder
from shardwise.tasks.corpus import STDLIB, SplitDocuments, read_documents, split_documents
from shardwise.tasks.packing import PackedTokens, check_sequence_length
from shardwise.tasks.task import (
    SPLITS,
    Batch,
    Split,
    check_indices,
    label_count,
    next_token_loss,
    perplexity,
)
from shardwise.tasks.tokenizer import TOKENIZER_FILE, TextTokenizer, load_tokenizer, train_tokenizer

__all__ = ["CorpusOptions", "EncodedCorpus", "LanguageModelling"]

_FORMAT = "tokens-1"  # a new number makes cached tokens of older versions unused
_SUMMARY_FILE = "corpus.json"


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """What to read and how to cut it up.

    `sources` as in `read_documents`; `tokenizer` is a tokenizer.json or a folder that has one, and empty to
    train one of at most `vocabulary_size` tokens on the training documents; `cache` is the folder for
    tokenizer and tokens.
    """

    cache: str
    sources: str | tuple[str, ...] = STDLIB
    sequence_length: int = 256  # tokens
    vocabulary_size: int = 8192  # tokens, at most
    tokenizer: str = ""
    end_of_text: str = ""  # a token of a loaded tokenizer; empty: found by itself
    held_out_fraction: float = 0.02

    def __post_init__(self) -> None:
        check_sequence_length(self.sequence_length)
        if self.end_of_text and not self.tokenizer:
            raise ConfigError(
                f"a trained tokenizer has an end of text of its own; end_of_text={self.end_of_text!r} is for "
                "a loaded one; leave it out, or give a tokenizer"
            )


@dataclass(frozen=True, kw_only=True)
class EncodedCorpus:
    """What is known of prepared tokens. `fingerprint` stands for tokens and tokenizer together."""

    fingerprint: str
    vocabulary_size: int  # one more than the greatest token: rows of an embedding
    end_of_text: int
    num_documents: int
    num_bytes: int  # of the text, as UTF-8
    num_train_tokens: int
    num_held_out_tokens: int


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModelling:
    """A task: packed sequences of a prepared corpus. Memory-mapped; pickles as the path of its folder."""

    counts: ClassVar[str] = "tokens"  # see `Counted`

    folder: Path
    corpus: EncodedCorpus
    packed: Mapping[Split, PackedTokens]

    @staticmethod
    def prepare(options: CorpusOptions) -> Path:
        """Read, tokenize and store the corpus; returns the folder to `open`.

        Seconds for 10 MB; where the folder is there already, the time to read and hash the text.
        Safe when several processes do it at once, but meant for one: the others would work for nothing.
        Raises ConfigError for sources without text, a tokenizer that cannot be had, or too little text for
        one sequence.
        """
        documents = read_documents(options.sources)
        parts = split_documents(documents, held_out_fraction=options.held_out_fraction)
        tokenizer = _tokenizer(parts, options)
        made_of = [tokenizer.to_json(), str(tokenizer.end_of_text), str(options.held_out_fraction)]
        key = content_key([_FORMAT, *made_of, *documents])
        folder = filled_folder(Path(options.cache) / f"tokens-{key}", _filler(parts, tokenizer, key, len(documents)))
        # A corpus that is too short is refused here, not in every rank.
        LanguageModelling.open(folder, sequence_length=options.sequence_length)
        return folder.resolve()

    @classmethod
    def open(cls, folder: Path, *, sequence_length: int) -> LanguageModelling:
        """The task over a prepared folder; reads a few hundred bytes and maps the tokens.

        Raises ConfigError for a folder that `prepare` did not make, and for a corpus shorter than one
        sequence.
        """
        corpus = _read_summary(folder)
        if corpus.num_train_tokens < sequence_length:
            raise ConfigError(
                f"a corpus holds at least one sequence; {corpus.num_train_tokens} training tokens are fewer "
                f"than sequence_length={sequence_length}; give more text or shorter sequences"
            )
        packed = {
            split: PackedTokens(stream=_mapped(folder, split), sequence_length=sequence_length) for split in SPLITS
        }
        return cls(folder=folder, corpus=corpus, packed=packed)

    @property
    def sequence_length(self) -> int:
        """Tokens of every sample."""
        return self.packed["train"].sequence_length

    def num_samples(self, split: Split) -> int:
        """Samples of a split; a held-out split shorter than one sequence has none."""
        return self.packed[split].num_samples

    def samples(self, indices: Sequence[int], split: Split) -> dict[str, Tensor]:
        """`input_ids` and `labels`, int64 (len(indices), sequence_length). ConfigError for a wrong index."""
        check_indices(indices, num_samples=self.num_samples(split), split=split)
        return self.packed[split].batch(indices)

    def loss(self, outputs: object, batch: Batch) -> Tensor:
        """The model's own loss, else next-token cross entropy of its logits; nats per token, scalar."""
        return next_token_loss(outputs, batch)

    def weight(self, batch: Batch) -> float:
        """Labels that a next-token loss counts: the first of each sample and ignored ones are not."""
        return label_count(batch, shifted=True)

    def metrics(self, loss: float) -> dict[str, float]:
        """Perplexity: exp(loss)."""
        return {"perplexity": perplexity(loss)}

    def __reduce__(self) -> tuple[Callable[[str, int], LanguageModelling], tuple[str, int]]:
        return _reopened, (str(self.folder), self.sequence_length)


def _reopened(folder: str, sequence_length: int) -> LanguageModelling:
    return LanguageModelling.open(Path(folder), sequence_length=sequence_length)


def _tokenizer(parts: SplitDocuments, options: CorpusOptions) -> TextTokenizer:
    if options.tokenizer:
        return load_tokenizer(Path(options.tokenizer).expanduser(), end_of_text=options.end_of_text or None)
    return train_tokenizer(parts.train, vocabulary_size=options.vocabulary_size, cache=Path(options.cache))


def _filler(parts: SplitDocuments, tokenizer: TextTokenizer, key: str, num_documents: int) -> Callable[[Path], None]:
    """A function that writes tokens of both splits, tokenizer and summary into an empty folder."""

    def fill(folder: Path) -> None:
        texts: dict[Split, tuple[str, ...]] = {"train": parts.train, "held_out": parts.held_out}
        streams: dict[Split, np.ndarray] = {}
        for split, documents in texts.items():
            arrays = [np.empty(0, dtype=tokenizer.dtype), *tokenizer.encode(documents)]
            streams[split] = np.concatenate(arrays)  # (tokens of the split,)
            np.save(folder / f"{split}.npy", streams[split])
        summary = EncodedCorpus(
            fingerprint=key,
            vocabulary_size=tokenizer.vocabulary_size,
            end_of_text=tokenizer.end_of_text,
            num_documents=num_documents,
            num_bytes=sum(len(text.encode()) for text in (*parts.train, *parts.held_out)),
            num_train_tokens=len(streams["train"]),
            num_held_out_tokens=len(streams["held_out"]),
        )
        (folder / TOKENIZER_FILE).write_text(tokenizer.to_json(), encoding="utf-8")
        (folder / _SUMMARY_FILE).write_text(json.dumps(asdict(summary), indent=1), encoding="utf-8")

    return fill


def _read_summary(folder: Path) -> EncodedCorpus:
    try:
        return EncodedCorpus(**json.loads((folder / _SUMMARY_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"a corpus is opened from a folder that was prepared; {folder} holds none ({error}); prepare it first"
        ) from error


def _mapped(folder: Path, split: Split) -> np.ndarray:
    try:
        stream: np.ndarray = np.load(folder / f"{split}.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the tokens of {split} in {folder} are damaged ({error}); delete the folder and prepare it again"
        ) from error
    return stream
