"""Small models of many architectures, each with a batch that its forward takes, under the names of `MODELS`,
`DECODERS` and `POLICIES`.

Configurations of `transformers` with tiny sizes, and the hand-written modules of `hand_written`. Weights are random,
dropout, LayerDrop and SpecAugment are as the architecture has them. Knows nothing of layouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn as nn
import transformers as hf
from hand_written import TiedReader, TwoTowerPolicy, UNet

__all__ = ["DECODERS", "MODELS", "POLICIES", "Example", "make"]

BATCH, TOKENS, VOCABULARY = 8, 12, 97
_IMAGE = 32  # pixels of a side
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
_TOWER = {"image_size": _IMAGE, "patch_size": 8, **_SIZES}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A model in training mode, a batch for it, and its loss where the model does not return one."""

    model: nn.Module
    batch: Any
    loss: Callable[[Any, Any], torch.Tensor] | None = None


def make(name: str, *, seed: int = 0) -> Example:
    """The example `name`, with weights and batch drawn from `seed`; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = {**MODELS, **DECODERS, **POLICIES}[name]()
    made.model.train()
    return made


# -- batches ------------------------------------------------------------------------------------------


def _tokens(*, low: int = 3, high: int = VOCABULARY - 2) -> torch.Tensor:
    return torch.randint(low, high, (BATCH, TOKENS))


def _text() -> dict[str, torch.Tensor]:
    tokens = _tokens()
    return {"input_ids": tokens, "labels": tokens.clone()}


def _padded_text() -> dict[str, torch.Tensor]:
    """Rows of different lengths: unequal numbers of labels, and a mask."""
    batch = _text()
    mask = torch.arange(TOKENS) < torch.randint(TOKENS // 2, TOKENS + 1, (BATCH, 1))  # (batch, tokens)
    batch["labels"][~mask] = -100
    return {**batch, "attention_mask": mask.long()}


def _pixels(side: int = _IMAGE) -> torch.Tensor:
    return torch.randn(BATCH, 3, side, side)


def _images(side: int = _IMAGE) -> dict[str, torch.Tensor]:
    return {"pixel_values": _pixels(side), "labels": torch.randint(0, 2, (BATCH,))}


# -- language -----------------------------------------------------------------------------------------


def _bert() -> Example:
    return Example(model=hf.BertForMaskedLM(hf.BertConfig(vocab_size=VOCABULARY, **_SIZES)), batch=_padded_text())


def _roberta() -> Example:
    config = hf.RobertaConfig(vocab_size=VOCABULARY, **_SIZES)
    return Example(model=hf.RobertaForMaskedLM(config), batch=_padded_text())


def _albert() -> Example:
    config = hf.AlbertConfig(vocab_size=VOCABULARY, embedding_size=16, **{**_SIZES, "num_hidden_layers": 12})
    return Example(model=hf.AlbertForMaskedLM(config), batch=_text())


def _gpt2() -> Example:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2, loss_type="ForCausalLM"
    )
    return Example(model=hf.GPT2LMHeadModel(config), batch=_padded_text())


def _llama_model() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **_SIZES))


def _llama() -> Example:
    return Example(model=_llama_model(), batch=_text())


def _inner_loss(outputs: Any, batch: Any) -> torch.Tensor:
    return outputs.loss + outputs.hidden_states[2].pow(2).mean()


def _llama_inner() -> Example:
    return Example(model=_llama_model(), batch={**_text(), "output_hidden_states": True}, loss=_inner_loss)


def _mixtral() -> Example:
    config = hf.MixtralConfig(
        vocab_size=VOCABULARY,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.1,
        **_SIZES,
    )
    return Example(model=hf.MixtralForCausalLM(config), batch=_text())


def _mamba() -> Example:
    config = hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, state_size=4)
    return Example(model=hf.MambaForCausalLM(config), batch=_text())


def _decoder(model: Any, config: Any, **sizes: Any) -> Callable[[], Example]:
    """A maker of a causal language model of the class, with padded text."""
    return lambda: Example(model=model(config(vocab_size=VOCABULARY, **sizes)), batch=_padded_text())


def _deepseek_v3() -> Example:
    config = hf.DeepseekV3Config(
        vocab_size=VOCABULARY,
        num_key_value_heads=4,
        kv_lora_rank=8,
        q_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        **_SIZES,
    )
    return Example(model=hf.DeepseekV3ForCausalLM(config), batch=_padded_text())


def _t5() -> Example:
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0
    )
    return Example(model=hf.T5ForConditionalGeneration(config), batch=_padded_text())


def _bart() -> Example:
    config = hf.BartConfig(encoder_layerdrop=0.2, decoder_layerdrop=0.2, **_SEQ2SEQ)
    return Example(model=hf.BartForConditionalGeneration(config), batch=_padded_text())


# -- images and sound ---------------------------------------------------------------------------------


def _vit() -> Example:
    return Example(model=hf.ViTForImageClassification(hf.ViTConfig(**_TOWER)), batch=_images())


def _resnet() -> Example:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[2, 2, 2, 2])
    images = _images(2 * _IMAGE)  # four places are left at the end: BatchNorm can do with one image
    return Example(model=hf.ResNetForImageClassification(config), batch=images)


def _whisper() -> Example:
    config = hf.WhisperConfig(
        **_SEQ2SEQ,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    batch = {"input_features": torch.randn(BATCH, 8, 40), "labels": _tokens()}
    return Example(model=hf.WhisperForConditionalGeneration(config), batch=batch)


def _wav2vec2() -> Example:
    config = hf.Wav2Vec2Config(
        vocab_size=32,
        conv_dim=(16, 16),
        conv_stride=(4, 4),
        conv_kernel=(8, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.3,
        mask_time_length=2,
        mask_feature_prob=0.2,
        mask_feature_length=2,
        layerdrop=0.1,
        ctc_loss_reduction="mean",
        **_SIZES,
    )
    batch = {"input_values": torch.randn(BATCH, 800), "labels": torch.randint(1, 31, (BATCH, 5))}
    return Example(model=hf.Wav2Vec2ForCTC(config), batch=batch)


# -- images and language ------------------------------------------------------------------------------


def _clip() -> Example:
    text = {"vocab_size": VOCABULARY, "eos_token_id": VOCABULARY - 1, "bos_token_id": 1, "pad_token_id": 0, **_SIZES}
    # Small weights, or rounding in the gradients of the key biases, which are zero in truth, stands out of the whole.
    towers = {
        "text_config": {**text, "initializer_factor": 0.3},
        "vision_config": {**_TOWER, "initializer_factor": 0.3},
    }
    config = hf.CLIPConfig(**towers, projection_dim=16)
    tokens = _tokens()
    tokens[:, -1] = VOCABULARY - 1  # a text is represented at its end
    batch = {"input_ids": tokens, "pixel_values": _pixels(), "return_loss": True}
    return Example(model=hf.CLIPModel(config), batch=batch)


def _llava() -> Example:
    image_token, patches = VOCABULARY - 1, (_IMAGE // 8) ** 2
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_TOWER),
        text_config=hf.LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, **_SIZES),
        image_token_index=image_token,
        image_token_id=image_token,
        image_seq_length=patches,
        vision_feature_layer=-2,
    )
    tokens = _tokens()
    shown = torch.full((BATCH, patches), image_token)
    batch = {
        "input_ids": torch.cat([shown, tokens], dim=1),  # (batch, patches + tokens)
        "labels": torch.cat([torch.full_like(shown, -100), tokens], dim=1),
        "pixel_values": _pixels(),
    }
    return Example(model=hf.LlavaForConditionalGeneration(config), batch=batch)


def _pi0() -> Example:
    """The vision-language-action model of Physical Intelligence: its action expert reads the keys and values that every
    layer of the language model leaves in a cache."""
    image_token, patches = VOCABULARY - 1, (_IMAGE // 8) ** 2
    text = {**_SIZES, "num_key_value_heads": 1, "head_dim": 8}
    config = hf.PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "text_config": {"model_type": "gemma", "vocab_size": VOCABULARY, **text},
            "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **_TOWER},
            "projection_dim": 32,
            "image_token_id": image_token,
        },
        dit_config={"model_type": "gemma", **text, "hidden_size": 16, "intermediate_size": 32},
        chunk_size=2,
        max_state_dim=4,
        max_action_dim=7,
    )
    tokens = torch.cat([torch.full((BATCH, patches), image_token), _tokens()], dim=1)  # (batch, patches + tokens)
    batch = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": _pixels()[:, None],  # (batch, cameras, 3, side, side)
        "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool),
        "state": torch.randn(BATCH, 4),
        "actions": torch.randn(BATCH, 2, 7),
        "noise": torch.randn(BATCH, 2, 7),  # without them it draws its own
        "timestep": torch.rand(BATCH),
    }
    return Example(model=hf.PI0ForConditionalGeneration(config), batch=batch)


# -- written by hand ----------------------------------------------------------------------------------


def _squared_error(outputs: torch.Tensor, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return nn.functional.mse_loss(outputs, batch[-1][:, : outputs.shape[1]])


def _unet() -> Example:
    image = _pixels()
    return Example(model=UNet(), batch=(image,), loss=_squared_error)


def _tied_loss(outputs: torch.Tensor, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), batch[0].flatten())


def _tied() -> Example:
    return Example(model=TiedReader(vocabulary=VOCABULARY), batch=(_tokens(low=0),), loss=_tied_loss)


def _policy() -> Example:
    batch = {"image": _pixels(), "instruction": _tokens(low=0), "action": torch.randn(BATCH, 7)}
    return Example(model=TwoTowerPolicy(vocabulary=VOCABULARY), batch=batch)


# Decoders that differ in how their projections are packed, which heads they share, and where their norms stand.
DECODERS: Mapping[str, Callable[[], Example]] = MappingProxyType(
    {
        "bloom": _decoder(hf.BloomForCausalLM, hf.BloomConfig, hidden_size=32, n_layer=4, n_head=4),
        "falcon": _decoder(
            hf.FalconForCausalLM, hf.FalconConfig, hidden_size=32, num_hidden_layers=4, num_attention_heads=4
        ),
        "gpt_neox": _decoder(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, **_SIZES),
        "phi3": _decoder(hf.Phi3ForCausalLM, hf.Phi3Config, pad_token_id=0, num_key_value_heads=2, **_SIZES),
        "gemma2": _decoder(hf.Gemma2ForCausalLM, hf.Gemma2Config, head_dim=8, num_key_value_heads=2, **_SIZES),
        "qwen3_moe": _decoder(
            hf.Qwen3MoeForCausalLM,
            hf.Qwen3MoeConfig,
            head_dim=8,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            **_SIZES,
        ),
        "deepseek_v3": _deepseek_v3,
    }
)

# Their action experts read what a language model leaves in a cache.
POLICIES: Mapping[str, Callable[[], Example]] = MappingProxyType({"pi0": _pi0})

MODELS: Mapping[str, Callable[[], Example]] = MappingProxyType(
    {
        "bert": _bert,
        "roberta": _roberta,
        "gpt2": _gpt2,
        "llama": _llama,
        "t5": _t5,
        "bart": _bart,
        "albert": _albert,
        "vit": _vit,
        "resnet": _resnet,
        "mixtral": _mixtral,
        "whisper": _whisper,
        "mamba": _mamba,
        "clip": _clip,
        "wav2vec2": _wav2vec2,
        "llava": _llava,
        "llama-inner-loss": _llama_inner,
        "unet": _unet,
        "tied": _tied,
        "policy": _policy,
    }
)
