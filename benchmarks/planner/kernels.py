"""Kernels of a decoder's layer, embedding and head on one shard, as the stacks of the sources run them.

    layer      norm, q k v, (rotary), attention, output, norm, up (and gate), activation, down; dropout if there is any
    backward   of each product one for the input and one for the weight; of each pass over memory one of its size

16-bit values are 2 bytes, the loss is float32. Shapes are (batch, m, n, k). Refuses to know seconds and layouts.
"""

from __future__ import annotations

import math

from benchmarks.planner.shapes import Shard
from benchmarks.planner.stacks import Stack
from shardwise.describe.kernels import Kernel, KernelKind, Phase

__all__ = [
    "attention_kernels",
    "embedding_kernels",
    "head_kernels",
    "layer_kernels",
]

F, B, W = Phase.FORWARD, Phase.INPUT, Phase.WEIGHT


def layer_kernels(shard: Shard, stack: Stack, dtype: str) -> tuple[Kernel, ...]:
    """Of one layer, forward and backward, without recomputation."""
    arch, tokens, between = shard.arch, shard.tokens, shard.between
    wide = shard.heads * arch.head_dim
    kv = shard.kv_heads * arch.head_dim
    found = [
        *_passes(2, 2 * _norm(between, arch.hidden), 2 * _norm(between, arch.hidden, back=True)),
        *_linear(tokens, wide + 2 * kv, arch.hidden, dtype, stack, count=1),
        *_linear(tokens, arch.hidden, wide, dtype, stack, count=1),
        *attention_kernels(shard, stack, dtype),
        *_added(between * arch.hidden, stack),
    ]
    if arch.rotary:
        turned = 4 * tokens * (wide + kv)  # read and written
        found += _passes(1 if stack.compiled else 2, turned, turned)
    if arch.experts:
        found += _experts(shard, stack, dtype)
        if arch.shared:
            found += _mlp(tokens, math.ceil(arch.shared / shard.tp), shard, stack, dtype)
    else:
        found += _mlp(tokens, shard.ffn, shard, stack, dtype)
    return tuple(found)


def embedding_kernels(shard: Shard, stack: Stack) -> tuple[Kernel, ...]:
    """Rows are looked up; their gradients are added into a whole table of zeros."""
    size = shard.tokens * shard.arch.hidden
    table = shard.vocab(stack.padded_vocab) * shard.arch.hidden
    return (
        *_passes(1, 4 * size, 6 * size),
        *_added(shard.between * shard.arch.hidden, stack, residual=False),
        _memory(W, 2 * table, fixed=2 * table),
        _grown(table, stack),
    )


def head_kernels(shard: Shard, stack: Stack, dtype: str) -> tuple[Kernel, ...]:
    """Norm, logits, and the loss over the vocabulary in float32, as Megatron's cross_entropy.py runs it: a float32 copy
    (6 bytes an element), maximum (4), subtracted (8), exponentials (8), their sum (4), quotient (8); backward a product
    in place (8) and a 16-bit copy (6)."""
    vocab = shard.vocab(stack.padded_vocab)
    logits = shard.tokens * vocab
    forward, backward = (12, 10) if stack.compiled else (38, 14)  # compiled: fused into two passes and one
    return (
        *_passes(1, _norm(shard.between, shard.arch.hidden), _norm(shard.between, shard.arch.hidden, back=True)),
        *_linear(shard.tokens, vocab, shard.arch.hidden, dtype, stack, count=1),
        *_passes(2 if stack.compiled else 6, forward * logits, 0),
        *_passes(1 if stack.compiled else 2, 0, backward * logits),
    )


def _mlp(tokens: int, ffn: int, shard: Shard, stack: Stack, dtype: str) -> list[Kernel]:
    """Up (and gate, one product), activation, down."""
    arch = shard.arch
    wide = ffn * (arch.mats - 1)
    inner = tokens * ffn
    if arch.mats == 3 and not stack.compiled:
        acts = _passes(2, 10 * inner, 16 * inner)  # activation 2 + 2 and 2 + 2 + 2, product 4 + 2 and 6 + 4
    else:
        acts = _passes(1, 2 * arch.mats * inner, 2 * (2 * arch.mats - 1) * inner)
    return [
        *_linear(tokens, wide, arch.hidden, dtype, stack, count=1),
        *_linear(tokens, arch.hidden, ffn, dtype, stack, count=1),
        *acts,
        *_added(shard.between * arch.hidden, stack),
    ]


def _experts(shard: Shard, stack: Stack, dtype: str) -> list[Kernel]:
    """Tokens are sorted by expert, computed as one product of a batch a matrix, and put back; experts evenly busy."""
    arch = shard.arch
    here = max(1, arch.experts // shard.ep)
    seen = math.ceil(shard.tokens * arch.top_k / here)  # of every expert here, from all ranks that share experts
    ffn = math.ceil(arch.expert_ffn / shard.tp)
    rows = here * seen
    moved = 4 * rows * arch.hidden
    return [
        *_linear(shard.between, arch.experts, arch.hidden, dtype, stack, count=1),
        *_passes(4, moved, moved),
        *_linear(seen, ffn * (arch.mats - 1), arch.hidden, dtype, stack, count=1, batch=here),
        *_linear(seen, arch.hidden, ffn, dtype, stack, count=1, batch=here),
        *_passes(1, 2 * arch.mats * rows * ffn, 2 * (2 * arch.mats - 1) * rows * ffn),
    ]


def attention_kernels(shard: Shard, stack: Stack, dtype: str) -> list[Kernel]:
    """Between the products of a layer: scores, softmax, dropout and contexts, or one kernel that fuses them."""
    arch = shard.arch
    batch, width = shard.samples * shard.heads, arch.head_dim
    queries, keys = shard.sequence, shard.whole
    if stack.fused_attention:
        flops = 2 * batch * queries * keys * width  # two products of 2 q k d flops each, the half below the mask
        nbytes = 2 * batch * width * (2 * queries + 2 * keys)
        shape = (batch, queries, keys, width, width)
        return [
            Kernel(kind=KernelKind.ATTENTION, phase=F, dtype=dtype, flops=flops, nbytes=nbytes, shape=shape),
            Kernel(
                kind=KernelKind.ATTENTION, phase=B, dtype=dtype, flops=5 * flops // 2, nbytes=2 * nbytes, shape=shape
            ),
        ]
    scores = batch * queries * keys
    products = [
        *_product(F, dtype, batch, queries, keys, width),
        *_product(F, dtype, batch, queries, width, keys),
        *_product(B, dtype, batch, queries, keys, width),  # of probabilities
        *_product(B, dtype, batch, queries, width, keys),  # of queries
        *_product(B, dtype, batch, keys, width, queries, count=2),  # of keys and of values
    ]
    softmax = _softmax(scores, batch)
    dropped = _passes(1, 5 * scores, 5 * scores) if stack.dropout else []
    layout = 4 * batch * queries * width  # contexts are put side by side
    return [*products, *softmax, *dropped, *_passes(1, layout, layout)]


def _softmax(scores: int, batch: int) -> list[Kernel]:
    """Scale, mask and softmax in one kernel; Megatron has it where sequences and batch times heads are multiples of 4
    (fused_softmax.py: `attn_batches % 4 == 0`), else five passes with a float32 copy."""
    if batch % 4 == 0:
        return _passes(1, 4 * scores, 6 * scores)
    return _passes(6, 32 * scores, 24 * scores)


def _linear(tokens: int, out: int, into: int, dtype: str, stack: Stack, *, count: int, batch: int = 1) -> list[Kernel]:
    """A layer's product, its two of the backward, and the weight's gradient added to those of other micro-batches."""
    return [
        *_product(F, dtype, batch, tokens, out, into, count=count, weights=True),
        *_product(B, dtype, batch, tokens, into, out, count=count, weights=True),
        *_product(W, dtype, batch, out, into, tokens, count=count),
        _grown(batch * out * into, stack),
    ]


def _product(
    phase: Phase, dtype: str, batch: int, m: int, n: int, k: int, *, count: int = 1, weights: bool = False
) -> list[Kernel]:
    own = 2 * batch * m * (n + k)
    return [
        Kernel(
            kind=KernelKind.MATMUL,
            phase=phase,
            dtype=dtype,
            flops=2 * batch * m * n * k,
            nbytes=own + 2 * batch * n * k,
            shape=(batch, m, n, k),
            batch_dims=(1,) if weights else (0,),
            count=count,
        )
    ]


def _grown(parameters: int, stack: Stack) -> Kernel:
    """A 16-bit gradient is added to what micro-batches add up to: read, read, written."""
    return _memory(W, (2 + 2 * stack.summed_bytes) * parameters, fixed=(2 + 2 * stack.summed_bytes) * parameters)


def _added(elements: int, stack: Stack, *, residual: bool = True) -> list[Kernel]:
    """A residual sum; with dropout (and the bias) in the same kernel, whose mask is a byte an element."""
    if stack.dropout:
        return _passes(1, (7 if residual else 5) * elements, 5 * elements)
    return _passes(1, 6 * elements, 2 * elements) if residual else []


def _norm(tokens: int, hidden: int, *, back: bool = False) -> float:
    """Bytes: read and written; backward reads the input and the gradient."""
    return (8 if back else 4) * tokens * hidden


def _passes(kernels: int, forward: float, backward: float) -> list[Kernel]:
    """`kernels` passes over memory of so many bytes altogether, forward and backward."""
    return [
        _memory(phase, nbytes / kernels, count=kernels) for phase, nbytes in ((F, forward), (B, backward)) if nbytes
    ]


def _memory(phase: Phase, nbytes: float, *, count: int = 1, fixed: float = 0) -> Kernel:
    whole = round(nbytes)
    own = None if not fixed else max(0, whole - round(fixed))
    return Kernel(kind=KernelKind.MEMORY, phase=phase, dtype="float32", nbytes=whole, batch_bytes=own, count=count)
