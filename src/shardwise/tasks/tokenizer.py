"""Text to tokens: a byte-level BPE tokenizer, trained on a corpus or loaded from tokenizer.json.

It knows the `tokenizers` library, which it imports when it is first needed; it refuses to know sequences,
splits and where the text came from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shardwise.errors import ConfigError
from shardwise.tasks.cache import content_key, filled_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "END_OF_TEXT",
    "TOKENIZER_CONFIG_FILE",
    "TOKENIZER_FILE",
    "TextTokenizer",
    "load_tokenizer",
    "train_tokenizer",
]

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"  # beside it: transformers' names of tokens

_FORMAT = "bpe-1"  # a new number makes cached tokenizers of older versions unused
_MIN_VOCABULARY_SIZE = 257  # every byte, and the end of text
_PIECE_CHARS = 2**18  # long documents are encoded in pieces, so that threads share one big file
_BATCH_CHARS = 2**23  # text in flight at a time: bounds the memory of the library's encodings
_USUAL_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


@dataclass(frozen=True, kw_only=True, eq=False)
class TextTokenizer:
    """A tokenizer and the token that ends a document."""

    live: Tokenizer
    end_of_text: int
    vocabulary_size: int  # one more than the greatest token: rows of an embedding

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smallest unsigned type of numpy that holds every token, 16 bits or 32."""
        return np.dtype(np.uint16 if self.vocabulary_size <= 2**16 else np.uint32)

    def to_json(self) -> str:
        """The text of a tokenizer.json that `load_tokenizer` and transformers read."""
        return str(self.live.to_str())

    def encode(self, documents: Sequence[str]) -> Iterator[NDArray[np.unsignedinteger]]:
        """Tokens of the documents in order, each document followed by its end of text, in arrays of any
        length.

        What looks like a special token in a text is encoded as the text it is. Runs in the library's own
        threads.
        """
        for batch in _batches(documents):
            encodings = self.live.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
            for encoding, (_, ends) in zip(encodings, batch, strict=True):
                yield np.array(encoding.ids + [self.end_of_text] * ends, dtype=self.dtype)


def train_tokenizer(
    documents: Sequence[str], *, vocabulary_size: int, cache: Path, specials: Sequence[str] = ()
) -> TextTokenizer:
    """Byte-level BPE of at most vocabulary_size tokens, END_OF_TEXT and `specials` among them, kept in a folder
    below `cache`.

    Every text can be encoded and comes back byte for byte. A small corpus gives a smaller vocabulary than
    asked for. Trained once for equal documents and size (Sennrich et al., ACL 2016; on bytes: Radford et al.,
    GPT-2, 2019). Raises ConfigError for a vocabulary under 257 or if `tokenizers` is not installed.
    """
    least = _MIN_VOCABULARY_SIZE + len(specials)
    if vocabulary_size < least:
        raise ConfigError(
            f"a byte-level vocabulary holds 256 bytes and {', '.join(('the end of text', *specials))}; "
            f"vocabulary_size={vocabulary_size} is too small; use {least} or more"
        )
    key = content_key([_FORMAT, str(vocabulary_size), *specials, *documents])

    def fill(folder: Path) -> None:
        trained = _train(documents, vocabulary_size, specials)
        (folder / TOKENIZER_FILE).write_text(trained.to_str(), encoding="utf-8")

    return load_tokenizer(filled_folder(cache / f"tokenizer-{key}", fill))


def load_tokenizer(source: Path, *, end_of_text: str | None = None) -> TextTokenizer:
    """The tokenizer in a tokenizer.json, or in a folder that has one (a transformers checkpoint, say).

    The end of text is `end_of_text` where given, else `eos_token` of tokenizer_config.json beside the file,
    else the first of the usual names that the vocabulary has. Raises ConfigError for a missing or damaged
    file, for an end of text that is not in the vocabulary, or if `tokenizers` is not installed.
    """
    library = _tokenizers()
    file = source / TOKENIZER_FILE if source.is_dir() else source
    if not file.is_file():
        raise ConfigError(
            f"a tokenizer is a {TOKENIZER_FILE} or a folder that has one; {source} is neither; "
            "correct the path, or leave it out to train one"
        )
    try:
        live = library.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{file} is no tokenizer of the `tokenizers` library: {error}; save it again") from error
    live.no_truncation()
    live.no_padding()
    live.encode_special_tokens = True
    vocabulary = live.get_vocab()
    return TextTokenizer(
        live=live,
        end_of_text=_end_token(vocabulary, file, end_of_text),
        vocabulary_size=max(vocabulary.values()) + 1,
    )


def _train(documents: Sequence[str], vocabulary_size: int, specials: Sequence[str]) -> Tokenizer:
    library = _tokenizers()
    byte_level = library.pre_tokenizers.ByteLevel
    tokenizer: Tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT, *specials],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer=trainer, length=len(documents))
    return tokenizer


def _end_token(vocabulary: dict[str, int], file: Path, asked: str | None) -> int:
    configured = _configured_end(file.parent / TOKENIZER_CONFIG_FILE)
    candidates = [asked] if asked is not None else [configured, *_USUAL_ENDS]
    for name in candidates:
        if name is not None and name in vocabulary:
            return vocabulary[name]
    tried = [name for name in candidates if name]
    raise ConfigError(
        f"documents are joined by an end-of-text token; none of {tried} is among the "
        f"{len(vocabulary)} tokens of {file}; name one of its tokens as end_of_text"
    )


def _configured_end(file: Path) -> str | None:
    """`eos_token` of a tokenizer_config.json: a string, or a mapping with the string under `content`."""
    if not file.is_file():
        return None
    try:
        token = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{file} holds one JSON object; it does not: {error}; save it again") from error
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _batches(documents: Sequence[str]) -> Iterator[list[tuple[str, bool]]]:
    """(piece, whether it ends its document) in lists of about _BATCH_CHARS characters."""
    batch: list[tuple[str, bool]] = []
    chars = 0
    for document in documents:
        pieces = list(_pieces(document))
        for i, piece in enumerate(pieces):
            batch.append((piece, i == len(pieces) - 1))
            chars += len(piece)
            if chars >= _BATCH_CHARS:
                yield batch
                batch, chars = [], 0
    if batch:
        yield batch


def _pieces(document: str) -> Iterator[str]:
    """The document cut at line ends, at most _PIECE_CHARS characters a piece; one piece at least."""
    start = 0
    while len(document) - start > _PIECE_CHARS:
        cut = document.rfind("\n", start, start + _PIECE_CHARS) + 1
        end = cut if cut > start else start + _PIECE_CHARS
        yield document[start:end]
        start = end
    yield document[start:]


def _tokenizers() -> ModuleType:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise ConfigError(
            "text is tokenized by the `tokenizers` library, which is not installed; run: pip install 'shardwise[hf]'"
        ) from error
    return tokenizers
