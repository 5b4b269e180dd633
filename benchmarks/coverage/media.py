"""Images, patches, sound and features of speech of the sizes that a config names; random values.

Refuses to know text and names of arguments; that is the business of `inputs`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from benchmarks.coverage.guess import SAMPLES, Guess, first_of, number_in

__all__ = ["SIDE", "Media"]

SIDE = 4  # patches of a side, where images come as patches
_VISION = ("vision_config", "image_config", "vision_tower_config", "vision_encoder_config")
_AUDIO = ("audio_config", "encoder_config", "speech_config", "encoder")
_SIDES = ("image_size", "img_size", "input_image_size", "pretrain_image_size")
_FEATURES = (
    "num_mel_bins", "feature_size", "input_dim", "input_feat_size", "feature_projection_input_dim", "input_size",
    "mel_bins", "n_mels",
)  # fmt: skip
_VIDEO = ("Video", "TimeSformer", "Timesformer", "Vivit", "XCLIP")


class Media:
    """What is seen and heard, one method for each form. Tensors are float, the first axis the samples unless said."""

    def __init__(self, model: Any, guess: Guess, generator: torch.Generator) -> None:
        self.config, self.guess, self.generator = model.config, guess, generator
        self.names = frozenset(inspect.signature(model.forward).parameters)
        self.grid = bool({"image_grid_thw", "grid_thw", "image_grid_hws", "grid_hw"} & self.names)
        self.video = any(word in type(model).__name__ for word in _VIDEO)
        self.patch = int(self.seen("patch_size", default=16))
        self.channels = int(self.seen("num_channels", "in_channels", "in_chans", default=3))

    def seen(self, *names: str, default: Any) -> Any:
        """A number of the vision part of the config."""
        return first_of(number_in(self.config, *names, default=default, within=_VISION))

    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        side = number_in(self.config, *_SIDES, default=64, within=_VISION)
        height, width = side if isinstance(side, list | tuple) and len(side) == 2 else 2 * (first_of(side),)
        return self.channels, int(height), int(width)

    def pixels(self) -> torch.Tensor:
        """Images; patches of all samples in a row where a grid comes beside them."""
        if self.guess.several:
            return self.normal(SAMPLES, 1, *self.image_shape())
        width = self.guess.width or self.channels * int(self.seen("temporal_patch_size", default=1)) * self.patch**2
        if "spatial_shapes" in self.names:
            return self.normal(SAMPLES, SIDE * SIDE, width)
        if self.grid:
            return self.normal(SAMPLES * SIDE * SIDE, width)
        if self.guess.width:
            return self.normal(SAMPLES, (self.image_shape()[1] // self.patch) ** 2, width)
        return self.film("num_frames") if self.video else self.normal(SAMPLES, *self.image_shape())

    def film(self, *names: str) -> torch.Tensor:
        """(samples, frames, channels, height, width)."""
        return self.normal(SAMPLES, int(number_in(self.config, *names, default=4)), *self.image_shape())

    def features(self) -> torch.Tensor:
        """Features of speech: (samples, features, frames), or frames first, or with a channel before both."""
        bins = int(self.guess.width or first_of(number_in(self.config, *_FEATURES, default=80, within=_AUDIO)))
        frames = 2 * int(number_in(self.config, "max_source_positions", default=32, within=_AUDIO))
        if self.guess.raw_channel:
            return self.normal(SAMPLES, 1, frames, bins)
        return self.normal(SAMPLES, frames, bins) if self.guess.time_first else self.normal(SAMPLES, bins, frames)

    def sound(self) -> torch.Tensor:
        """A wave: (samples, time), with a channel between, or a spectrogram of (samples, time, bins)."""
        if self.guess.time_first:
            bins = int(number_in(self.config, "num_mel_bins", default=80))
            return self.normal(SAMPLES, int(number_in(self.config, "max_length", default=64)), bins)
        return self.normal(SAMPLES, 1, 4000) if self.guess.raw_channel else self.normal(SAMPLES, 4000)

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self.generator)
