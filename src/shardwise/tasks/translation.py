"""Translation: a text in one language, given a text in another.

    source   Ġcannot Ġopen Ġ% s </s>                  the encoder's input
    target   Ġkann Ġ% s Ġnicht Ġöffnen </s>           the labels
    shown    <pad> Ġkann Ġ% s Ġnicht Ġöffnen          the decoder's input: the target, one place later

Pairs of like lengths are trained on together, each side padded to the longest of a batch. It knows how pairs
become tokens and what a translation is worth; it refuses to know models, ranks and steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.errors import ConfigError
from shardwise.files import read_text
from shardwise.tasks.by_step import alike_indices
from shardwise.tasks.cache import content_key, filled_folder
from shardwise.tasks.greedy import GreedyRules, greedily, seq2seq_batch
from shardwise.tasks.head import ModelHead
from shardwise.tasks.pairs import Pair, SplitPairs, split_pairs
from shardwise.tasks.parallel_text import read_pairs
from shardwise.tasks.played import Game
from shardwise.tasks.ragged import Ragged
from shardwise.tasks.task import IGNORED_LABEL, SPLITS, Batch, Split, check_indices, logits_of
from shardwise.tasks.tokenizer import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TextTokenizer,
    load_tokenizer,
    train_tokenizer,
)
from shardwise.tasks.translation_score import check_sacrebleu, translation_score

__all__ = ["FAMILY", "PreparedTranslation", "Translation", "TranslationOptions"]

FAMILY = "AutoModelForSeq2SeqLM"

_FORMAT = "pairs-1"  # a new number makes cached tokens of older versions unused
_SUMMARY_FILE = "pairs.json"
_HELD_OUT_FILE = "held_out.json"
_PADDING = "<pad>"
_USUAL_PADDINGS = (_PADDING, "[PAD]", "<|pad|>")


@dataclass(frozen=True, kw_only=True)
class TranslationOptions:
    """What to read and how to make tokens of it.

    `data` as in `read_pairs`; `tokenizer` is a tokenizer.json or a folder that has one, the model's if it is loaded;
    without one both languages share a vocabulary of at most `vocabulary_size` tokens, trained on the training pairs.
    Pairs of which a side has more than `max_tokens` are left out. Lengths are padded to multiples of `pad_to`, as every
    pair of lengths that is new is traced; `alike` batches are sorted by length together.

    An evaluation translates `translated` held-out pairs (0: all), `rows` at a time.
    """

    cache: str
    data: str | tuple[str, ...]
    source: str = "en"
    target: str = "de"
    tokenizer: str = ""
    vocabulary_size: int = 8000  # tokens, at most
    max_tokens: int = 64
    held_out_fraction: float = 0.05
    label_smoothing: float = 0.1
    pad_to: int = 8
    alike: int = 32
    translated: int = 500
    rows: int = 64

    def __post_init__(self) -> None:
        if self.max_tokens < 2 or self.pad_to < 1 or self.alike < 1 or self.rows < 1 or self.translated < 0:
            raise ConfigError(
                "a text has a token before its end; lengths, batches and rows are counted from 1, but max_tokens="
                f"{self.max_tokens}, pad_to={self.pad_to}, alike={self.alike}, rows={self.rows}, translated="
                f"{self.translated}; use 64, 8, 32, 64 and 500"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing lies in [0, 1), but got {self.label_smoothing}; 0.1 is usual")


@dataclass(frozen=True, kw_only=True)
class PairSummary:
    """What is known of prepared pairs."""

    fingerprint: str
    vocabulary_size: int  # tokens
    start: int  # what a decoder begins with
    end: int
    padding: int
    max_tokens: int
    num_train: int  # pairs
    num_held_out: int
    left_out: Mapping[str, int]  # pairs by reason


@dataclass(frozen=True, kw_only=True)
class PreparedTranslation:
    """What a rank needs to open prepared pairs; the options as in `TranslationOptions`."""

    folder: str
    label_smoothing: float = 0.1
    pad_to: int = 8
    alike: int = 32
    translated: int = 500
    rows: int = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Translation:
    """A task over a prepared folder. Memory-mapped; pickles as its path and options."""

    counts: ClassVar[str] = "tokens"  # see `Counted`

    how: PreparedTranslation
    summary: PairSummary
    sources: Mapping[Split, Ragged] = field(repr=False)  # tokens of every text, the end among them
    targets: Mapping[Split, Ragged] = field(repr=False)
    order: tuple[int, ...] = field(repr=False)  # [training pair]: what pairs of like lengths have alike

    @staticmethod
    def prepare(options: TranslationOptions) -> PreparedTranslation:
        """Read, clean, tokenize and store; returns what `open` takes. Raises ConfigError for data without pairs."""
        check_sacrebleu()
        read = read_pairs(options.data, source=options.source, target=options.target)
        split = split_pairs(read.pairs, held_out=read.held_out, held_out_fraction=options.held_out_fraction)
        if not split.train:
            raise ConfigError(
                f"there are pairs to train on, but of {len(read.pairs)} none is left ({_told(split.left_out)}); give "
                "more data"
            )
        chosen = _Vocabulary.of(split, options)
        texts = [text for which in (split.train, split.held_out) for p in which for text in (p.source, p.target)]
        made_of = [chosen.tokenizer.to_json(), str((chosen.start, chosen.end, chosen.padding)), str(options.max_tokens)]
        key = content_key([_FORMAT, *made_of, str(len(split.train)), *texts])
        filler = _filler(split, chosen, key, options.max_tokens)
        folder = filled_folder(Path(options.cache) / f"translation-{key}", filler).resolve()
        prepared = PreparedTranslation(
            folder=str(folder),
            label_smoothing=options.label_smoothing,
            pad_to=options.pad_to,
            alike=options.alike,
            translated=options.translated,
            rows=options.rows,
        )
        if not Translation.open(prepared).num_samples("train"):
            raise ConfigError(
                f"a pair has at most max_tokens={options.max_tokens} tokens on each side, but all "
                f"{len(split.train)} have more; use more, such as 64"
            )
        return prepared

    @classmethod
    def open(cls, prepared: PreparedTranslation) -> Translation:
        """The task over a prepared folder. Raises ConfigError for a folder that `prepare` did not make."""
        folder = Path(prepared.folder)
        try:
            summary = PairSummary(**json.loads((folder / _SUMMARY_FILE).read_text(encoding="utf-8")))
            sources, targets = (
                {split: Ragged.open(folder, f"{split}-{name}") for split in SPLITS} for name in ("source", "target")
            )
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"pairs are opened from a folder that was prepared; {folder} holds none ({error}); prepare it first"
            ) from error
        lengths = zip(sources["train"].lengths, targets["train"].lengths, strict=True)
        unit = summary.max_tokens + 1
        order = tuple(-(-source // prepared.pad_to) * unit + target for source, target in lengths)
        return cls(how=prepared, summary=summary, sources=sources, targets=targets, order=order)

    @property
    def folder(self) -> Path:
        """Where tokens, texts and tokenizer are."""
        return Path(self.how.folder)

    @property
    def vocabulary_size(self) -> int:
        """Rows that a model needs."""
        return self.summary.vocabulary_size

    @property
    def sequence_length(self) -> int:
        """Tokens of the longest sample or translation, padded."""
        return -(-self.summary.max_tokens // self.how.pad_to) * self.how.pad_to

    def num_samples(self, split: Split) -> int:
        """Pairs of a split."""
        return self.sources[split].num_rows

    def head(self) -> ModelHead:
        """Encoder-decoder; sizes and tokens with a meaning for a model that has no values yet."""
        known = self.summary
        tokens = {"pad_token_id": known.padding, "eos_token_id": known.end, "forced_eos_token_id": known.end}
        sizes = {"vocab_size": known.vocabulary_size, "decoder_vocab_size": known.vocabulary_size}
        return ModelHead(family=FAMILY, config={"decoder_start_token_id": known.start}, inputs={**tokens, **sizes})

    def indices(self, *, seed: int, step: int, global_batch: int) -> tuple[int, ...]:
        """Pairs of like lengths: by the source's, padded, and then the target's."""
        return alike_indices(self.order, seed=seed, step=step, global_batch=global_batch, num_batches=self.how.alike)

    def samples(self, indices: Sequence[int], split: Split) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `decoder_input_ids` and `target_labels`, int64 (len(indices), tokens of the
        longest, padded)."""
        return self.padded(indices, split, batch=indices)

    def padded(self, indices: Sequence[int], split: Split, *, batch: Sequence[int]) -> dict[str, Tensor]:
        """Like `samples`, each side padded to the longest of `batch`."""
        check_indices([*indices, *batch], num_samples=self.num_samples(split), split=split)
        sources, targets = ([side[split].row(i) for i in indices] for side in (self.sources, self.targets))
        sides = (self.sources[split].lengths, self.targets[split].lengths)
        source, target = (self._padded(max((lengths[i] for i in batch), default=1)) for lengths in sides)
        return seq2seq_batch(sources, targets, (source, target), start=self.summary.start, padding=self.summary.padding)

    def loss(self, outputs: object, batch: Batch) -> Tensor:
        """Cross entropy of the logits (batch, tokens, vocabulary), of which `label_smoothing` goes to all tokens alike
        (Szegedy et al. 2016, section 7); nats per token, scalar."""
        logits = logits_of(outputs)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        targets = batch["target_labels"].to(logits.device).flatten()
        total = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            targets,
            ignore_index=IGNORED_LABEL,
            label_smoothing=self.how.label_smoothing,
            reduction="sum",
        )
        return total / (targets != IGNORED_LABEL).sum().clamp(min=1)

    def weight(self, batch: Batch) -> float:
        """Tokens of translations."""
        return float((batch["target_labels"] != IGNORED_LABEL).sum().item())

    def metrics(self, loss: float) -> dict[str, float]:
        """None: figures come from `play`."""
        return {}

    def replies(self, outputs: object, batch: Batch) -> dict[str, Tensor]:
        """`best`: the likeliest token at every place, int32 (rows, tokens)."""
        return {"best": logits_of(outputs).argmax(-1).to(torch.int32)}

    def play(self, split: Split) -> Game:
        """Translates the first pairs of a split greedily, and scores the translations."""
        count = min(self.how.translated or self.num_samples(split), self.num_samples(split))
        known = self.summary
        rules = GreedyRules(
            start=known.start,
            end=known.end,
            padding=known.padding,
            rows=self.how.rows,
            pad_to=self.how.pad_to,
            max_tokens=known.max_tokens,
        )
        sources = [np.asarray(self.sources[split].row(number), dtype=np.int64) for number in range(count)]
        said = yield from greedily(sources, rules)
        live = load_tokenizer(self.folder).live
        texts = [" ".join(text.split()) for text in live.decode_batch([tokens.tolist() for tokens in said])]
        return translation_score(self.pairs(split)[:count], texts)

    def pairs(self, split: Split) -> tuple[Pair, ...]:
        """The texts of the held-out pairs; of others only tokens are kept."""
        if split != "held_out":
            raise ConfigError("texts are kept of held-out pairs alone, but those to train on were asked for")
        read = json.loads((self.folder / _HELD_OUT_FILE).read_text(encoding="utf-8"))
        return tuple(Pair(source=source, target=target) for source, target in read)

    def _padded(self, length: int) -> int:
        return -(-length // self.how.pad_to) * self.how.pad_to

    def __reduce__(self) -> tuple[Callable[[PreparedTranslation], Translation], tuple[PreparedTranslation]]:
        return Translation.open, (self.how,)


@dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    """A tokenizer, its tokens with a meaning, and what stands before a text: a trained one has a space before words,
    and so the first one is given one."""

    tokenizer: TextTokenizer
    start: int
    end: int
    padding: int
    before: str = ""

    @classmethod
    def of(cls, split: SplitPairs, options: TranslationOptions) -> _Vocabulary:
        """Trained on the training pairs, or loaded. A decoder begins with the padding, as those of Marian and T5 do,
        unless config.json beside a loaded tokenizer says otherwise."""
        if not options.tokenizer:
            texts = [f" {text}" for pair in split.train for text in (pair.source, pair.target)]
            trained = train_tokenizer(
                texts, vocabulary_size=options.vocabulary_size, cache=Path(options.cache), specials=(_PADDING,)
            )
            padding = trained.live.get_vocab()[_PADDING]
            return cls(tokenizer=trained, start=padding, end=trained.end_of_text, padding=padding, before=" ")
        folder = Path(options.tokenizer).expanduser()
        loaded = load_tokenizer(folder)
        told = _config_beside(folder)
        usual = next((i for i in map(loaded.live.token_to_id, _USUAL_PADDINGS) if i is not None), loaded.end_of_text)
        padding, end = told.get("pad_token_id", usual), told.get("eos_token_id", loaded.end_of_text)
        return cls(tokenizer=loaded, start=told.get("decoder_start_token_id", padding), end=end, padding=padding)

    def encoded(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, and the end."""
        encodings = self.tokenizer.live.encode_batch([self.before + text for text in texts])
        return [ids if ids[-1:] == [self.end] else [*ids, self.end] for ids in (each.ids for each in encodings)]


def _config_beside(folder: Path) -> dict[str, int]:
    """The tokens with a meaning in the config.json of a folder, where it says any."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    text = read_text(file, what="a model config", repair="correct task.tokenizer")
    try:
        told = json.loads(text)
        return {name: value for name, value in told.items() if name.endswith("token_id") and type(value) is int}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"a model config is a JSON object, but {file} is none: {error}; correct it") from error


def _filler(split: SplitPairs, vocabulary: _Vocabulary, key: str, max_tokens: int) -> Callable[[Path], None]:
    """A function that writes tokens of both splits, held-out texts, tokenizer and summary into an empty folder."""

    def fill(folder: Path) -> None:
        left_out = dict(split.left_out)
        texts: Mapping[Split, Sequence[Pair]] = {"train": split.train, "held_out": split.held_out}
        counts: dict[Split, int] = {}
        for name, pairs in texts.items():
            sources, targets = (vocabulary.encoded([getattr(p, side) for p in pairs]) for side in ("source", "target"))
            kept = [i for i in range(len(pairs)) if max(len(sources[i]), len(targets[i])) <= max_tokens]
            left_out["too many tokens"] = left_out.get("too many tokens", 0) + len(pairs) - len(kept)
            counts[name] = len(kept)
            for side, rows in (("source", sources), ("target", targets)):
                Ragged.of([rows[i] for i in kept], dtype=np.int32).save(folder, f"{name}-{side}")
            if name == "held_out":
                chosen = [(pairs[i].source, pairs[i].target) for i in kept]
                (folder / _HELD_OUT_FILE).write_text(json.dumps(chosen, ensure_ascii=False), encoding="utf-8")
        summary = PairSummary(
            fingerprint=key,
            vocabulary_size=vocabulary.tokenizer.vocabulary_size,
            start=vocabulary.start,
            end=vocabulary.end,
            padding=vocabulary.padding,
            max_tokens=max_tokens,
            num_train=counts["train"],
            num_held_out=counts["held_out"],
            left_out=left_out,
        )
        end = vocabulary.tokenizer.live.id_to_token(vocabulary.end)
        (folder / TOKENIZER_FILE).write_text(vocabulary.tokenizer.to_json(), encoding="utf-8")
        (folder / TOKENIZER_CONFIG_FILE).write_text(json.dumps({"eos_token": end}), encoding="utf-8")
        (folder / _SUMMARY_FILE).write_text(json.dumps(asdict(summary), indent=1), encoding="utf-8")

    return fill


def _told(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items())
