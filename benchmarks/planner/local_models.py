"""The models that are planned, run and measured on this machine: a decoder, an encoder, a mixture of experts.

As transformers has them, made from a config, with their own losses on whole sequences; without dropout, so that every
step does the same. Knows models and batches; refuses to know layouts and the clock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn as nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

__all__ = ["GLOBAL_BATCH", "SAMPLES", "SETTINGS", "Setting"]

GLOBAL_BATCH = 8
SAMPLES = 2  # of a micro-batch, on every layout
_TOKENS, _VOCABULARY, _WIDTH = 128, 4096, 256
_MASKED = 0.15  # of an encoder's tokens (Devlin et al. 2019)


def _decoder() -> nn.Module:
    """6.5 million parameters: norms by root mean square, gated perceptrons, grouped keys, rotary places."""
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=_WIDTH,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=_TOKENS,
            use_cache=False,
        )
    )
    return model


def _encoder() -> nn.Module:
    """5.9 million parameters: norms behind, GELU, a table of places, a head that is tied to the embedding."""
    model: nn.Module = BertForMaskedLM(
        BertConfig(
            vocab_size=_VOCABULARY,
            hidden_size=_WIDTH,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=8,
            max_position_embeddings=_TOKENS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    return model


def _experts() -> nn.Module:
    """9.2 million parameters, of which a token uses 6.0: two of four experts a layer."""
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=_VOCABULARY,
            hidden_size=_WIDTH,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=_TOKENS,
            use_cache=False,
        )
    )
    model.set_experts_implementation("grouped_mm")  # shapes that do not depend on the routing
    made: nn.Module = model
    return made


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One model with its data. `masked`: labels are hidden tokens, else the next ones."""

    name: str
    model: Callable[[], nn.Module]
    masked: bool = False

    def batch(self, samples: int = GLOBAL_BATCH) -> dict[str, torch.Tensor]:
        """The same for the same number: ids and labels, (samples, tokens)."""
        generator = torch.Generator().manual_seed(samples)
        ids = torch.randint(0, _VOCABULARY, (samples, _TOKENS), generator=generator)
        if not self.masked:
            return {"input_ids": ids, "labels": ids.clone()}
        hidden = torch.rand(samples, _TOKENS, generator=generator) < _MASKED
        return {"input_ids": ids.masked_fill(hidden, 0), "labels": ids.masked_fill(~hidden, -100)}


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        each.name: each
        for each in (
            Setting(name="decoder", model=_decoder),
            Setting(name="encoder", model=_encoder, masked=True),
            Setting(name="experts", model=_experts),
        )
    }
)
