"""Attention of some queries over some keys, with what is needed to join it with that over others, and its gradient.

    out, lse = softmax(s) v, log Σ exp(s)        s = scale · q kᵀ + bias        (Milakov & Gimelshein 2018, Dao 2023)
    joined:  lse = log(e^lse₁ + e^lse₂)          out = e^(lse₁ − lse) out₁ + e^(lse₂ − lse) out₂

Fused kernels where they are exact; the rest written out. Knows neither positions nor ranks. A row that sees nothing has
lse = −inf and out = 0, as torch's own attention answers.
"""

from __future__ import annotations

import dataclasses
import math

import torch

__all__ = ["Extras", "Joined", "attend", "attend_backward", "compute_dtype", "is_fused"]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_FUSED = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype scores and sums are kept: float32 for the half types."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Extras:
    """What else decides a block; all tensors broadcast to (samples, heads, rows, columns)."""

    scale: float
    causal: bool = False  # row i sees columns 0 to i
    mask: torch.Tensor | None = None  # boolean (True: seen), or added to the scores
    shift: torch.Tensor | None = None  # taken from the scores once they are rounded; (…, rows, 1)
    keep: torch.Tensor | None = None  # boolean: weights that dropout leaves, times 1 / (1 − p)
    kept_weight: float = 1.0
    wants_mask_gradient: bool = False

    def seen(self) -> Extras | None:
        """The same without a mask that hides nothing; None where it hides all. Reads a boolean mask's values."""
        if self.mask is None or self.mask.dtype != torch.bool or self.mask.device.type != "cpu":
            return self
        if bool(self.mask.all()):
            return dataclasses.replace(self, mask=None)
        return self if bool(self.mask.any()) else None


def attend(
    q: torch.Tensor,  # (samples, heads, rows, d)
    k: torch.Tensor,  # (samples, kv_heads, columns, d)
    v: torch.Tensor,  # (samples, kv_heads, columns, dv)
    extras: Extras,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (samples, heads, rows, dv) and log-sum-exp (samples, heads, rows), which is of `compute_dtype`."""
    if not is_fused(q, k, v, extras):
        return _plain(q, k, v, extras)
    bias = _added(extras.mask, q.dtype)
    q, k, v = (_dense(x) for x in (q, k, v))
    out, lse = _flash(q, k, v, 0.0, extras.causal, attn_mask=bias, scale=extras.scale)
    if bias is not None:
        hidden = (bias == -math.inf).all(-1)  # where the kernel answers 0, which may be a sum as well
        lse = lse.masked_fill(hidden, -math.inf)
    return out, lse


def attend_backward(
    gradient: torch.Tensor,  # of the joined output
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,  # joined, as lse
    lse: torch.Tensor,
    extras: Extras,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What this block adds to the gradients of q, k and v, and of the scores where the mask has one."""
    lse = lse.masked_fill(lse == -math.inf, math.inf)  # rows that see nothing: their weights are 0, not nan
    if not is_fused(q, k, v, extras):
        return _plain_backward(gradient, q, k, v, out, lse, extras)
    bias = _added(extras.mask, q.dtype)
    q, k, v, out, gradient = (_dense(x) for x in (q, k, v, out, gradient))
    dq, dk, dv = _flash_backward(gradient, q, k, v, out, lse, 0.0, extras.causal, attn_mask=bias, scale=extras.scale)
    return dq, dk, dv, None


class Joined:
    """The rows of one rank while blocks are joined into them."""

    def __init__(self, q: torch.Tensor, value_dim: int) -> None:
        """`q` (samples, heads, rows, d) gives shape, dtype and device."""
        self._dtype = compute_dtype(q.dtype)
        self._shape, self._value_dim, self._device = q.shape[:-1], value_dim, q.device
        self._out: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None

    def add(self, rows: tuple[int, int], out: torch.Tensor, lse: torch.Tensor) -> None:
        """Join the answer of a block for rows [start, stop) into what there is. The answer is given away."""
        if self._out is None and rows == (0, self._shape[-1]):
            self._out, self._lse = out.to(self._dtype), lse
            return
        all_out, all_lse = self._begun()
        start, stop = rows
        total, sums = all_out[..., start:stop, :], all_lse[..., start:stop]
        joined = torch.logaddexp(sums, lse)
        finite = joined.masked_fill(joined == -math.inf, 0)  # rows that still see nothing keep their zeros
        total.mul_(torch.exp(sums - finite).unsqueeze(-1))
        total.addcmul_(out.to(total.dtype), torch.exp(lse - finite).unsqueeze(-1))
        sums.copy_(joined)

    def answer(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Output (samples, heads, rows, dv) of `dtype`, and log-sum-exp (samples, heads, rows)."""
        out, lse = self._begun()
        return out.to(dtype), lse

    def _begun(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._out is None or self._lse is None:
            self._out = torch.zeros((*self._shape, self._value_dim), dtype=self._dtype, device=self._device)
            self._lse = torch.full(self._shape, -math.inf, dtype=self._dtype, device=self._device)
        return self._out, self._lse


# -- fused --------------------------------------------------------------------------------------


def is_fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras) -> bool:
    """Whether torch's CPU kernel computes exactly this, and returns the sums."""
    plain = extras.shift is None and extras.keep is None and not extras.wants_mask_gradient
    same = q.dtype == k.dtype == v.dtype and q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] > 0
    return plain and same and q.device.type == "cpu" and q.dtype in _FUSED


def _added(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask.logical_not(), -math.inf)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """The kernel reads wrong elements where the last dim has a stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


# -- written out --------------------------------------------------------------------------------


def _scores(q: torch.Tensor, k: torch.Tensor, extras: Extras) -> torch.Tensor:
    """(samples, heads, rows, columns) in `compute_dtype`."""
    dtype = compute_dtype(q.dtype)
    samples, heads, rows, _ = q.shape
    grouped = (q.to(dtype) * extras.scale).reshape(samples, k.shape[1], -1, q.shape[-1])  # heads of one key head
    scores = (grouped @ k.to(dtype).transpose(-2, -1)).view(samples, heads, rows, k.shape[-2])
    if extras.causal:
        unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill_(unseen, -math.inf)
    if extras.mask is not None and extras.mask.dtype == torch.bool:
        scores = scores.masked_fill_(extras.mask.logical_not(), -math.inf)
    elif extras.mask is not None:
        scores = scores.add_(extras.mask)
    return scores if extras.shift is None else scores.sub_(extras.shift)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras) -> tuple[torch.Tensor, torch.Tensor]:
    scores = _scores(q, k, extras)
    lse = scores.logsumexp(-1)
    finite = lse.masked_fill(lse == -math.inf, 0).unsqueeze(-1)
    weights = _dropped(scores.sub_(finite).exp_(), extras)
    samples, heads, rows, columns = weights.shape
    out = weights.view(samples, k.shape[1], -1, columns) @ v.to(weights.dtype)
    return out.view(samples, heads, rows, v.shape[-1]), lse


def _plain_backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,  # inf where a row sees nothing
    extras: Extras,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    dtype = compute_dtype(q.dtype)
    samples, kv_heads, columns, _ = k.shape
    gradient, out = gradient.to(dtype), out.to(dtype)
    weights = _scores(q, k, extras).sub_(lse.unsqueeze(-1)).exp_()  # (samples, heads, rows, columns)
    of_head = gradient.reshape(samples, kv_heads, -1, v.shape[-1])
    dv = _dropped(weights, extras).view(samples, kv_heads, -1, columns).transpose(-2, -1) @ of_head
    of_weights = (of_head @ v.to(dtype).transpose(-2, -1)).view(weights.shape)
    of_weights = _dropped(of_weights, extras)
    delta = (gradient * out).sum(-1, keepdim=True)  # Σ weights · their gradients
    of_scores = weights.mul_(of_weights.sub_(delta))
    grouped = of_scores.view(samples, kv_heads, -1, columns)
    dq = (grouped @ k.to(dtype)).view(q.shape).mul_(extras.scale)
    dk = (grouped.transpose(-2, -1) @ q.to(dtype).reshape(samples, kv_heads, -1, q.shape[-1])).mul_(extras.scale)
    return dq, dk, dv, of_scores if extras.wants_mask_gradient else None


def _dropped(weights: torch.Tensor, extras: Extras) -> torch.Tensor:
    return weights if extras.keep is None else weights * extras.keep * extras.kept_weight
