"""Guesses of what a forward takes, the fullest first, and better ones read from errors.

Knows the names of transformers' arguments and the words of its errors, not architectures. The values are made by
`inputs`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["MEDIA", "SAMPLES", "Guess", "first_of", "guesses", "number_in", "parts", "repaired"]

SAMPLES = 2
MEDIA = frozenset({"pixel_values", "input_features", "input_values"})
_NEVER = frozenset({"labels", "kwargs", "return_dict", "past_key_values", "output_hidden_states", "output_attentions"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guess:
    """What is given to a forward. `slots`: places in the text of each sample, by kind of medium."""

    labels: bool
    media: bool
    sizes: bool = True  # of images
    time_first: bool = False
    raw_channel: bool = False
    codes: bool = False  # several tokens at a place, one of each code book
    several: bool = False  # images of a sample, on an axis of their own
    width: int = 0  # of features, where the config does not tell
    more: tuple[str, ...] = ()  # arguments that an error asked for
    slots: tuple[tuple[str, int], ...] = ()


def guesses(model: Any) -> Iterator[Guess]:
    """Every guess for a model, in the order in which they are tried: with labels and all media first."""
    names = set(inspect.signature(model.forward).parameters)
    speech = bool(names & {"input_features", "audio_values"})
    sound = "input_values" in names
    has_media = bool(names & MEDIA) and bool(names & {"input_ids"})
    for labels in (True, False) if "labels" in names else (False,):
        for media in (True, False) if has_media else (True,):
            yield Guess(labels=labels, media=media)
            if "image_sizes" in names and media:
                yield Guess(labels=labels, media=media, sizes=False)
            if speech and media:
                yield Guess(labels=labels, media=media, time_first=True)
                yield Guess(labels=labels, media=media, time_first=True, raw_channel=True)
            if number_in(model.config, "num_codebooks", "num_vq") and "input_ids" in names:
                yield Guess(labels=labels, media=media, codes=True)
            if sound and media:
                yield Guess(labels=labels, media=media, raw_channel=True)
                yield Guess(labels=labels, media=media, time_first=True)


# -- from errors -----------------------------------------------------------------------------------------

_COUNTS = re.compile(
    r"(?P<kind>[Ii]mage|[Vv]ideo|[Aa]udio|[Ss]peech)?.{0,80}?tokens?\D{0,20}?(?P<tokens>\d+)\D{1,40}?(?P<features>\d+)",
    re.S,
)
_OF_SOME_WIDTH = {"input_features", "hidden_states", "pixel_values", "noise_embeds", "inputs_embeds"}
_PRODUCT = re.compile(r"mat1 and mat2 shapes cannot be multiplied \(\d+x\d+ and (\d+)x\d+\)")


def repaired(guess: Guess, error: str, model: Any, batch: Mapping[str, Any]) -> Guess | None:
    """The guess that an error asks for: places in the text, an argument, an axis, a width. None if it does not say."""
    missing = [name for name in inspect.signature(model.forward).parameters if re.search(rf"\b{name}\b", error)]
    missing = [name for name in missing if name not in guess.more and name not in batch and name not in _NEVER]
    if missing and not _COUNTS.search(error):
        return dataclasses.replace(guess, more=(*guess.more, missing[0]))
    if "not enough values to unpack (expected" in error and "pixel_values" in batch and not guess.several:
        return dataclasses.replace(guess, several=True)
    product = _PRODUCT.search(error)
    if product is not None and not guess.width and not guess.raw_channel and batch.keys() & _OF_SOME_WIDTH:
        return dataclasses.replace(guess, width=int(product[1]), time_first=True)
    found = _COUNTS.search(error)
    if found is None or "match" not in error.lower() or not guess.media:
        return None
    kind = "audio" if (found["kind"] or "image").lower() in ("audio", "speech") else "image"
    features = int(found["features"])
    before = dict(guess.slots).get(kind)
    hidden = int(number_in(model.config, "hidden_size", default=1, within=("text_config",)) or 1)
    each = features // SAMPLES
    if each == before or each > 600:
        each = features // hidden // SAMPLES
    if each == before or each < 1:
        return None
    return dataclasses.replace(guess, slots=tuple({**dict(guess.slots), kind: each}.items()))


# -- numbers in configs ----------------------------------------------------------------------------------


def number_in(config: Any, *names: str, default: Any = None, within: tuple[str, ...] = ()) -> Any:
    """The first of the fields `names` that a config has, looked for in the sub-configs `within` first."""
    for part in [*(vars(config).get(w) for w in within), config, *parts(config)]:
        if part is None or not hasattr(type(part), "model_type"):
            continue
        for name in names:
            value = vars(part).get(type(part).attribute_map.get(name, name), vars(part).get(name))
            if value is not None and not isinstance(value, bool):
                return value
    return default


def parts(config: Any) -> list[Any]:
    """The configs inside a config, at any depth."""
    own = [value for value in vars(config).values() if hasattr(type(value), "model_type")]
    return [*own, *(deeper for value in own for deeper in parts(value))]


def first_of(value: Any) -> Any:
    """A number, of a field that may be a list of them."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return value
