"""Make up inputs for a model: from the names in its forward's signature and the sizes in its config.

Knows what the names of transformers' arguments stand for (tokens, images, patches with their grid, sound, series), not
architectures. What is given is told by a `Guess`; values are random, drawn from one generator.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from benchmarks.coverage.guess import MEDIA, SAMPLES, Guess, first_of, number_in, parts
from benchmarks.coverage.media import SIDE, Media

__all__ = ["batch_of"]

TOKENS = 12
_CLASSES = ("SequenceClassification", "ImageClassification", "AudioClassification", "VideoClassification")
_TOKENS = frozenset(
    {"decoder_input_ids", "qformer_input_ids", "tasks_input_ids", "classes_input_ids", "inputs", "task_inputs"}
)
_IMAGE_TOKENS = (
    "image_token_id", "image_token_index", "im_token_id", "media_placeholder_token_id",
    "image_patch_id", "img_token_id",
)  # fmt: skip
_AUDIO_TOKENS = ("audio_token_id", "audio_token_index", "speech_token_id", "speech_token_index")
_WITH_MEDIA = frozenset({
    "image_grid_thw", "grid_thw", "image_grid_hws", "grid_hw", "image_sizes", "mm_token_type_ids",
    "input_features_mask", "feature_attention_mask", "bbox", "image", "return_loss", "past_observed_mask",
    "future_values", "future_time_features", "pixel_attention_mask", "spatial_shapes", "image_attention_mask",
})  # fmt: skip


def batch_of(model: Any, guess: Guess, *, seed: int = 0) -> dict[str, Any]:
    """Arguments by name. Integer tensors (samples, tokens); images (samples, channels, height, width); and so on."""
    return _Inputs(model, guess, torch.Generator().manual_seed(seed)).batch()


class _Inputs:
    """One batch in the making: a method for each kind of argument."""

    def __init__(self, model: Any, guess: Guess, generator: torch.Generator) -> None:
        self.model, self.config, self.guess, self.generator = model, model.config, guess, generator
        self.parameters = inspect.signature(model.forward).parameters
        self.media = Media(model, guess, generator)
        self.normal = self.media.normal

    def batch(self) -> dict[str, Any]:
        wanted, batch = self.wanted(), dict[str, Any]()
        for name in self.parameters:
            value = self.value(name, batch) if name in wanted and name != "labels" else None
            if value is not None:
                batch[name] = value
        if self.guess.labels:
            batch["labels"] = self.labels(batch)
        return batch

    def wanted(self) -> set[str]:
        """Names of arguments that are given where a value for them is known."""
        main = self.model.main_input_name
        wanted = {name for name in self.parameters if self.required(name)} | set(self.guess.more)
        wanted |= {main} if isinstance(main, str) else set(main)
        wanted |= MEDIA | _WITH_MEDIA if self.guess.media else set()
        wanted |= {"decoder_input_ids"} if not self.guess.labels else set()
        return wanted | {"input_ids"} if main != "inputs" else wanted - {"input_ids"}

    def required(self, name: str) -> bool:
        parameter = self.parameters[name]
        variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        return parameter.default is parameter.empty and not variadic

    # -- by name ---------------------------------------------------------------------------------------

    def value(self, name: str, batch: dict[str, Any]) -> Any:
        media = self.media
        match name:
            case "input_ids":
                return self.ids()
            case _ if name in _TOKENS:
                return self.tokens(TOKENS)
            case "pixel_values" | "prompt_pixel_values":
                return media.pixels()
            case "hidden_states" if media.grid or (
                self.model.main_input_name == "pixel_values" and number_in(self.config, "image_size")
            ):
                return media.pixels()
            case "image_grid_thw" | "grid_thw":
                return torch.tensor([[1, SIDE, SIDE]] * SAMPLES)
            case "image_grid_hws" | "grid_hw" | "spatial_shapes":
                return torch.tensor([[SIDE, SIDE]] * SAMPLES)
            case "pixel_values_videos" if self.required(name) or "input_ids" not in self.parameters:
                return media.film("num_frames", "frames_per_clip")
            case "image_sizes" if self.guess.sizes:
                return torch.tensor([media.image_shape()[1:]] * SAMPLES)
            case "flattened_patches":
                return self.normal(SAMPLES, SIDE * SIDE, 2 + media.channels * media.patch**2).abs().ceil()
            case "image":
                return self.normal(SAMPLES, *media.image_shape())
            case "input_features":
                return media.features()
            case "input_values":
                return media.sound()
        return self.companion(name, batch)

    def companion(self, name: str, batch: dict[str, Any]) -> Any:
        """Masks, positions and states that stand beside the main inputs."""
        match name:
            case "mm_token_type_ids":
                return self.is_image(batch).long()
            case "input_features_mask" | "feature_attention_mask" if "input_features" in batch:
                frames = batch["input_features"].shape[1 if self.guess.time_first else -1]
                return torch.ones(SAMPLES, frames, dtype=torch.long)
            case "query_embeds" | "noise_embeds" | "inputs_embeds" | "context_hidden_states" | "hidden_states":
                return self.normal(SAMPLES, TOKENS, self.hidden())
            case "encoder_hidden_states":
                return self.normal(SAMPLES, TOKENS, self.hidden())
            case "visual_feats":
                return self.normal(SAMPLES, SIDE, int(number_in(self.config, "visual_feat_dim", default=64)))
            case "visual_pos":
                return self.normal(SAMPLES, SIDE, int(number_in(self.config, "visual_pos_dim", default=4)))
            case "latents":
                return self.normal(SAMPLES, self.hidden(), TOKENS)
            case "bbox":
                corners = torch.randint(1, 50, (SAMPLES, TOKENS, 2), generator=self.generator)
                return torch.cat([corners, corners + 20], -1)
            case "position_ids":
                return torch.arange(TOKENS).expand(SAMPLES, TOKENS)
            case "image_attention_mask" if self.guess.several:
                return torch.ones(SAMPLES, TOKENS, 1, dtype=torch.long)
            case "return_loss":
                return True
            case "merge_sizes":
                return torch.ones(SAMPLES, dtype=torch.long)
            case "pixel_attention_mask" if "spatial_shapes" in self.parameters and "input_ids" not in self.parameters:
                return torch.ones(SAMPLES, SIDE * SIDE, dtype=torch.long)
            case "attention_mask" | "classes_attention_mask" | "tasks_attention_mask" | "qformer_attention_mask":
                return torch.ones(SAMPLES, TOKENS, dtype=torch.long)
        return self.series(name, batch)

    def series(self, name: str, batch: dict[str, Any]) -> Any:
        """Arguments of models of time series: (samples, time, channels)."""
        config, past = self.config, batch.get("past_values")
        match name:
            case "past_values":
                length = int(number_in(config, "context_length", default=32))
                lags = number_in(config, "lags_sequence", default=[0])
                channels = int(number_in(config, "num_input_channels", "input_size", default=1))
                series = self.normal(SAMPLES, length + (max(lags) if isinstance(lags, list) else 0), channels)
                return series if "patch" in config.model_type else series.squeeze(-1)
            case "freq":
                return torch.zeros(SAMPLES, dtype=torch.long)
            case "past_values_padding" if past is not None:
                return torch.zeros(SAMPLES, past.shape[1], dtype=torch.long)
        if past is None or "past_time_features" not in self.parameters:
            return None
        steps = int(number_in(config, "prediction_length"))
        features = int(number_in(config, "num_time_features", default=1))
        match name:
            case "past_observed_mask":
                return torch.ones_like(past)
            case "past_time_features":
                return self.normal(SAMPLES, past.shape[1], features)
            case "future_time_features":
                return self.normal(SAMPLES, steps, features)
            case "future_values":
                return self.normal(SAMPLES, steps)
        return None

    def hidden(self) -> int:
        return self.guess.width or int(number_in(self.config, "hidden_size", "d_model", default=64))

    # -- text ------------------------------------------------------------------------------------------

    def tokens(self, length: int) -> torch.Tensor:
        """Ordinary tokens: none that the config gives a meaning."""
        found = number_in(self.config, "vocab_size", default=99, within=("text_config", "decoder", "encoder"))
        size = int(first_of(found) or 99)
        special = {
            value
            for part in (self.config, *parts(self.config))
            for name, value in vars(part).items()
            if name.endswith(("_id", "_index")) and isinstance(value, int)
        }
        usual = [token for token in range(min(3, size - 1), min(size, 300)) if token not in special] or [1]
        return torch.tensor(usual)[torch.randint(0, len(usual), (SAMPLES, length), generator=self.generator)]

    def ids(self) -> torch.Tensor:
        """Tokens with places for images and sound behind the first two."""
        if self.guess.codes:
            books = int(number_in(self.config, "num_codebooks", "num_vq"))
            return self.tokens(TOKENS * books).view(SAMPLES, TOKENS, books)
        ids = self.tokens(TOKENS)
        row = [ids[:, :2]]
        for kind, count in self.slots().items():
            token = self.token_of(kind)
            if token is not None:
                row.append(torch.full((SAMPLES, count), token))
        return torch.cat([*row, ids[:, 2:]], 1)

    def slots(self) -> dict[str, int]:
        slots = dict(self.guess.slots)
        if self.guess.media and self.media.grid and "image" not in slots:
            slots["image"] = SIDE * SIDE // int(self.media.seen("spatial_merge_size", "merge_size", default=1)) ** 2
        return slots

    def token_of(self, kind: str) -> int | None:
        found = number_in(self.config, *(_IMAGE_TOKENS if kind == "image" else _AUDIO_TOKENS))
        return None if found is None else int(found)

    def is_image(self, batch: dict[str, Any]) -> torch.Tensor:
        ids: torch.Tensor = batch.get("input_ids", torch.zeros(SAMPLES, TOKENS, dtype=torch.long))
        token = self.token_of("image")
        return ids.eq(-1 if token is None else token)

    def labels(self, batch: dict[str, Any]) -> torch.Tensor:
        """Of the shape that the name of the class tells; tokens where it tells none."""
        kind = type(self.model).__name__
        if any(word in kind for word in _CLASSES):
            return torch.arange(SAMPLES) % max(1, int(self.config.num_labels))
        if any(word in kind for word in ("CTC", "RNNT", "TDT")):
            return self.tokens(3)
        if "Segmentation" in kind:
            return torch.zeros(SAMPLES, *self.media.image_shape()[1:], dtype=torch.long)
        if "TokenClassification" in kind or "AudioFrame" in kind:
            return torch.zeros(SAMPLES, TOKENS, dtype=torch.long)
        ids: torch.Tensor = batch.get("input_ids", batch.get("inputs", self.tokens(TOKENS)))
        if self.model.main_input_name == "input_ids" and not self.config.is_encoder_decoder:
            return torch.where(self.is_image({"input_ids": ids}), -100, ids)
        return self.tokens(TOKENS)
