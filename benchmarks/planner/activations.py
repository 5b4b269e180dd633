"""Bytes that a decoder's block keeps for its backward, and needs while it computes, by the software that ran it.

Bytes of one micro-batch on one rank, 16 bit, part by part (Korthikanti et al. 2022, arXiv:2205.05198, section 4, where
the parts of a block without parallelism add up to s b h (34 + 5 a s / h)):

    norms     what both norms read: the residual stream            2 * 2 h    of the tokens between the products
    columns   what the first products of attention and MLP read    2 * 2 h    gathered, or gathered again: `gathered`
    qkv       queries, keys and values, as attention reads them
    core      its result; and probabilities, their mask and what is left of them where no kernel fuses them: 5 a s
    mlp       the products' results around the activation          4 f; gated `gate` f
    dropout   masks                                                2 * h

Physics of a stack: what its functions save, read in their source. Refuses to know rows and layouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from benchmarks.planner.shapes import Shard
from benchmarks.planner.stacks import Stack
from shardwise.plan.job import PerParameter

__all__ = [
    "Keeps",
    "block_bytes",
    "block_parts",
    "keeps_of",
    "logits_bytes",
    "saved_bytes",
    "transient_bytes",
    "weight_bytes",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keeps:
    """What a stack saves beyond what every one does.

    gathered: the share of what column products read that is kept as gathered, not as a shard's own tokens.
    copied: whether keys and values are copied between the product and the attention, and both copies stay alive.
    repeated: whether keys and values are repeated for all heads before attention saves them.
    gate: bytes for each of a gated MLP's ffn columns: 8 where activation and product are functions of their own (4 that
        come in, activation 2, product 2), 6 where they are one.
    logits: bytes for each token and entry of the vocabulary while the loss is computed.
    by_operation: whether selective recomputation keeps single operations' results.
    per_parameter, gradients_stay: see `plan.job`; over_context: whether state is divided among context ranks too.
    """

    gathered: float = 0.0
    copied: bool = False
    repeated: bool = False
    gate: int = 6
    logits: int = 10
    by_operation: bool = False
    per_parameter: PerParameter = dataclasses.field(default_factory=PerParameter.mixed)
    gradients_stay: bool = True
    over_context: bool = False


# Megatron: 16-bit logits, their float32 copy, and the softmax that becomes the gradient: 2 + 4 + 4.
_MEGATRON = Keeps()
_KEEPS: Mapping[str, Keeps] = MappingProxyType(
    {
        # nanotron at 0e0a27e: `qkv.permute().contiguous()` stays alive as queries, keys and values are stacked again;
        # GLUActivation is two functions; logits in float32, and in `_ShardedCrossEntropy` less their maximum: 10.
        # `FP32GradientAccumulator` holds all gradients in float32 beside those of 16 bit that a backward makes; DDP's
        # buckets hold them once more.
        "nanotron": Keeps(
            copied=True,
            gate=8,
            per_parameter=PerParameter(parameter=2, gradient=4, master=4, optimizer=8, fresh=2, wire=2),
        ),
        # torchtitan of 2024: `repeat_kv`; `pred.float()`, log_softmax and its gradient: 2 + 4 + 4 + 4
        "torchtitan": Keeps(
            repeated=True,
            gate=8,
            logits=14,
            by_operation=True,
            per_parameter=PerParameter(parameter=4, gradient=4, optimizer=8),
            gradients_stay=False,
            over_context=True,
        ),
        # 16-bit gradients added up in place, unscaled into float32 as the optimizer starts
        "Megatron-LM, Megatron-DeepSpeed (2021 to 2022)": Keeps(
            per_parameter=PerParameter(parameter=2, gradient=2, master=4, optimizer=8, temporary=4)
        ),
    }
)


def keeps_of(stack: Stack) -> Keeps:
    """By the stack's name; Megatron's where none is known."""
    return _KEEPS.get(stack.name, _MEGATRON)


def block_parts(shard: Shard, stack: Stack, keeps: Keeps) -> Mapping[str, float]:
    """Bytes of every part of a block that computes nothing again."""
    arch, tokens, between = shard.arch, shard.tokens, shard.between
    hidden, queries, keys = arch.hidden, shard.heads * arch.head_dim, shard.kv_heads * arch.head_dim
    once = 2.0 * tokens * (queries + 2 * (queries if keeps.repeated else keys))
    scores = 0.0 if stack.fused_attention else (2.0 + 3.0 * stack.dropout) * shard.heads * shard.whole * tokens
    return {
        "norms": 4.0 * hidden * between,
        "columns": 4.0 * hidden * (between + keeps.gathered * (tokens - between)),
        "qkv": once + (4.0 * tokens * keys if keeps.copied else 0.0),
        "core": 2.0 * tokens * queries + (4.0 * tokens * shard.heads if stack.fused_attention else 0.0),
        "scores": scores,
        "mlp": _mlp(shard, keeps),
        "dropout": 2.0 * hidden * between * stack.dropout,
    }


def block_bytes(shard: Shard, stack: Stack, *, recompute: str, keeps: Keeps | None = None) -> float:
    """Of one block, what remains between its forward and its backward.

    recompute: "none"; "full", all but its input is computed again; "selective", as the stack does it: all of attention
    between its products (Megatron), or all but every second product and the attention (torchtitan's per-op policy).
    """
    keeps = keeps_of(stack) if keeps is None else keeps
    parts = block_parts(shard, stack, keeps)
    whole = sum(parts.values())
    boundary = 2.0 * shard.arch.hidden * shard.between
    if recompute == "full":
        return boundary
    if recompute == "selective":
        if keeps.by_operation or stack.every_second:
            return min(whole, boundary + _every_second_product(shard) + parts["core"])
        return whole - parts["scores"]
    return whole


def saved_bytes(
    shard: Shard,
    stack: Stack,
    *,
    layers: int,
    recompute: str,
    first: bool,
    last: bool,
    keeps: Keeps | None = None,
) -> float:
    """Of a stage of so many blocks, with the embedding's dropout on the first and the head's inputs on the last."""
    keeps = keeps_of(stack) if keeps is None else keeps
    hidden = float(shard.arch.hidden)
    masks = hidden * shard.between * stack.dropout if first else 0.0
    gathered = shard.between + keeps.gathered * (shard.tokens - shard.between)
    head = 2.0 * hidden * (shard.between + gathered) if last else 0.0
    return layers * block_bytes(shard, stack, recompute=recompute, keeps=keeps) + masks + head


def weight_bytes(shard: Shard, stack: Stack, *, layers: int, keeps: Keeps | None = None) -> float:
    """Of a stage, what remains when the gradients of inputs are done: what its products read, and their gradients
    (32 s b h of a block without parallelism; Qi et al. 2023, arXiv:2401.10241, section 2)."""
    keeps = keeps_of(stack) if keeps is None else keeps
    arch, parts = shard.arch, block_parts(shard, stack, keeps)
    read = parts["columns"] + 2.0 * shard.tokens * (shard.heads * arch.head_dim + _ffn(shard))
    out = (shard.heads + 2 * shard.kv_heads) * arch.head_dim + _ffn(shard) * (arch.mats - 1) + 2 * arch.hidden
    return layers * (read + 2.0 * shard.tokens * out)


def transient_bytes(shard: Shard, stack: Stack, *, recompute: str, keeps: Keeps | None = None) -> float:
    """The most that is alive besides while a block computes its backward: what it computed again, and gradients."""
    keeps = keeps_of(stack) if keeps is None else keeps
    arch, tokens = shard.arch, shard.tokens
    whole = sum(block_parts(shard, stack, keeps).values())
    again = max(0.0, whole - block_bytes(shard, stack, recompute=recompute, keeps=keeps))
    mlp = 2.0 * tokens * _ffn(shard) * arch.mats
    scores = 0.0 if stack.fused_attention else 4.0 * shard.heads * shard.whole * tokens
    attention = 2.0 * tokens * arch.head_dim * (shard.heads + 2 * shard.kv_heads) + scores
    return again + max(mlp, attention) + 4.0 * tokens * arch.hidden


def logits_bytes(shard: Shard, stack: Stack, *, keeps: Keeps | None = None) -> float:
    """While the loss is computed on the last stage."""
    keeps = keeps_of(stack) if keeps is None else keeps
    return float(keeps.logits * shard.tokens * shard.vocab(stack.padded_vocab))


def _mlp(shard: Shard, keeps: Keeps) -> float:
    return shard.tokens * _ffn(shard) * float(keeps.gate if shard.arch.mats == 3 else 4)


def _ffn(shard: Shard) -> float:
    """Columns that a token passes: of a mixture, those of its experts and what all share."""
    arch = shard.arch
    return (arch.shared + arch.top_k * arch.expert_ffn) / shard.tp if arch.experts else float(shard.ffn)


def _every_second_product(shard: Shard) -> float:
    """Results of the first, third, fifth and seventh product of a block: queries, values, gate and the MLP's output."""
    arch = shard.arch
    columns = (shard.heads + shard.kv_heads) * arch.head_dim + _ffn(shard)
    return 2.0 * (shard.tokens * columns + shard.between * arch.hidden)
