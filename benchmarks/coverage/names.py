"""What the names of config fields mean: widths, layers, heads, vocabularies, token ids, sides of images, chances.

Knows words that transformers' configs use, not architectures. Everything here is a pure function of names and numbers.
"""

from __future__ import annotations

import re
from enum import Enum, auto

__all__ = ["Meaning", "meaning_of", "target_of"]


class Meaning(Enum):
    """What a number in a config counts."""

    WIDTH = auto()
    LAYERS = auto()
    DEPTHS = auto()  # a list: layers of every stage
    LAYER_INDEX = auto()  # one or several numbers of layers
    VOCABULARY = auto()
    TOKEN = auto()
    POSITIONS = auto()
    IMAGE = auto()
    CHANCE = auto()  # of dropping or masking something at random
    OTHER = auto()


_CHANCE = re.compile(r"drop(?!.*(type|token))|^mask_(time|feature)_prob$|stochastic_depth|survival|token_mask_prob")
_TOKEN = re.compile(
    r"(token|bos|eos|pad|sep|cls|mask|unk|eod|boi|eoi|boa|eoa)s?_?(id|index|ids)$|^(im|video|image|audio)_?\w*_(id|index)$"
)
_VOCABULARY = re.compile(r"vocab(ulary)?(_size)?(_per_layer_input)?$|^n_vocab$|^num_embeddings$|^text_vocab")
_LAYER_INDEX = re.compile(
    r"(index(es)?|indices|idxs?|_ids?)$|^vision_feature_layers?$|_layers_idx|^mlp_only_layers$|^full_attn|^cross_attention_layers$"
    r"|feature_layers?$|^attn_layer_(indices|ids)$|^hybrid_layer_ids$|^no_rope_layers$|^moe_layers$|_layer_ids?$"
)
_LAYERS = re.compile(
    r"^(n|num|encoder|decoder)_(hidden_)?layers?$|^depth$|_(num_)?(hidden_)?layers$|^num_\w*layers$|^num_blocks$|^layers$"
    r"|_depth$|^n_layers?$|^num_hidden_blocks$"
)
_NOT_LAYERS = re.compile(
    r"iou_head_depth|shared_layers|feat_extract|max_window_layers|adapter_layers|residual_layers|postnet_layers|max_depth"
    r"|decode.*proj|dense_layers|nextn|mlp_only|global_attn|lqe|proj_layers|freeze|use_|_every_|unfreeze|share"
)
_DEPTHS = re.compile(
    r"^(depths?|layers|num_layers|encoder_layers|num_blocks|block_repeats|stage_num_blocks|stage_numb_of_layers)$"
)
_POSITIONS = re.compile(
    r"^max_(position_embeddings|source_positions|target_positions|seq_len|sequence_length|seq_length|length)$"
    r"|^n_positions$|^n_ctx$|^seq_length$|^model_max_length$|^max_\w*position_embeddings$|^block_length$"
)
_NOT_POSITIONS = re.compile(r"2d|original")
_IMAGE = re.compile(
    r"^(image_size|img_size|input_image_size|pretrain_image_size|image_resolution|sample_size|crop_size)$"
)
_WIDTH = re.compile(
    r"size|dim|width|channel|inner|embd|d_model|d_ff|d_kv|rank|units|filters|hidden|feature|ffn|planes|^d_|attn_inner"
)
_NOT_WIDTH = re.compile(
    r"patch|window|kernel|chunk|block|crop|image_size|_index|layers|heads?$|num_channels|in_channels$|stride|batch|vocab|level"
    r"|context_size|type_vocab|bins|position|expansion|multiplier|audio_channels|ratio|query_dim|codebook_size|group|times|steps"
    r"|feature_sizes|grid|sample|input_size|max_|min_|num_(?!filters|channels)|n_features|loss|state_size|conv_kernel_dim|scale"
    r"|mel|spec_size|entity|coordinate_size|shape_size|_per_side|beam|buckets|_rate|token|out_features|reduction|pool"
)

# The well-known ones: name -> what the smallest coherent model has.
_HIDDEN, _FFN, _HEADS, _HEAD_DIM = 64, 128, 4, 16
_TARGETS: tuple[tuple[re.Pattern[str], int], ...] = (
    (
        re.compile(
            r"^(hidden_size|d_model|n_embd|dim|embed_dim|emb_dim|projection_dim|out_hidden_size|text_hidden_size)$"
        ),
        _HIDDEN,
    ),
    (
        re.compile(
            r"^(encoder|decoder|vision|text|output|projector|image_text|backbone|text_config|cross)_?\w*(hidden_size|hidden_dim)$"
        ),
        _HIDDEN,
    ),
    (
        re.compile(
            r"^(embedding_size|embedding_dim|output_channels|fpn_hidden_size|mask_feature_size|conv_dim|pooler_output_size|adapter_out_dim|word_embed_proj_dim)$"
        ),
        _HIDDEN,
    ),
    (
        re.compile(r"(intermediate_size|^d_ff|ffn_dim|^n_inner|^mlp_dim|ffn_hidden_size|^d_inner|dim_feedforward)$"),
        _FFN,
    ),
    (re.compile(r"^(num_attention_heads|n_heads?|num_heads|attention_heads)$|_attention_heads$|_num_heads$"), _HEADS),
    (
        re.compile(
            r"^(head_dim|d_kv|d_head|dim_head|attention_head_dim|attention_head_size|v_head_dim|qk_nope_head_dim)$"
        ),
        _HEAD_DIM,
    ),
    (re.compile(r"^(qk_rope_head_dim|global_head_dim|swa_head_dim)$"), _HEAD_DIM),
    (re.compile(r"^(q_lora_rank|kv_lora_rank|index_head_dim)$"), 2 * _HEAD_DIM),
    (re.compile(r"^(index_n_heads|linear_num_key_heads|linear_num_value_heads)$"), _HEADS),
    (re.compile(r"^(linear_key_head_dim|linear_value_head_dim)$"), _HEAD_DIM),
    (re.compile(r"^(mamba_n_heads|mamba_num_heads)$"), 2 * _HEADS),
    (re.compile(r"^(mamba_d_head|mamba_head_dim)$"), _HEAD_DIM),
    (re.compile(r"^(rotary_dim)$"), _HEAD_DIM // 2),
)
_SMALL: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts)$"), 4),
    (
        re.compile(
            r"^(num_experts_per_tok|moe_topk|moe_k|top_k_experts|moe_top_k|num_experts_per_token|experts_per_token)$"
        ),
        2,
    ),
    (re.compile(r"^(n_group|num_expert_group|num_expert_groups)$"), 2),
    (
        re.compile(
            r"^(topk_group|first_k_dense_replace|num_dense_layers|num_limited_groups|n_shared_experts|moe_num_shared_experts)$"
        ),
        1,
    ),
    (re.compile(r"^(mm_tokens_per_image)$"), 4),
    (re.compile(r"^(image_seq_length|num_image_tokens|image_seq_len|num_queries|num_query_tokens|num_denoising)$"), 16),
    (re.compile(r"^(sliding_window|attention_window|chunk_size|mamba_chunk_size|block_size|local_window_size)$"), 8),
    (re.compile(r"^codebook_size$"), 64),
    (re.compile(r"^index_topk$"), 16),
    (re.compile(r"^(num_nextn_predict_layers)$"), 4),
    (re.compile(r"^(num_register_tokens|prompt_length|resampler_depth)$"), 2),
)


def meaning_of(name: str, value: object) -> Meaning:
    """What a field counts, by its name and whether it is a number or a list of them."""
    several = isinstance(value, list | tuple)
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    if numbers and all(isinstance(one, float) for one in numbers):
        return Meaning.CHANCE if _CHANCE.search(name) else Meaning.OTHER
    if _VOCABULARY.search(name) and not name.startswith("type_"):
        return Meaning.VOCABULARY
    if _TOKEN.search(name):
        return Meaning.TOKEN
    if _IMAGE.search(name):
        return Meaning.IMAGE
    if several and _DEPTHS.search(name):
        return Meaning.DEPTHS
    if _LAYERS.search(name) and not _NOT_LAYERS.search(name) and not several:
        return Meaning.LAYERS
    if _LAYER_INDEX.search(name):
        return Meaning.LAYER_INDEX
    if _POSITIONS.search(name) and not _NOT_POSITIONS.search(name):
        return Meaning.POSITIONS
    if _WIDTH.search(name) and (not _NOT_WIDTH.search(name) or (several and name.endswith("in_channels"))):
        return Meaning.WIDTH
    if name.endswith("groups") and isinstance(value, int) and value >= 64:
        return Meaning.WIDTH
    return Meaning.OTHER


def target_of(name: str, *, only_counts: bool) -> int | None:
    """The small value of a well-known field; with `only_counts`, of experts, windows and tokens alone."""
    for pattern, value in _SMALL if only_counts else (*_SMALL, *_TARGETS):
        if pattern.search(name):
            return value
    return None
