"""Attention over whole sequences, written once, against which what divided ones give is compared. Knows no ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from shardwise.parallel.context.links import Links
from shardwise.parallel.context.placement import Placement

Divided = Callable[..., torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One attention: sizes, mask and how its sequences are dealt out."""

    size: int = 13
    heads: int = 4
    kv_heads: int = 4
    dim: int = 8
    value_dim: int = 8
    samples: int = 2
    zigzag: bool = True
    is_causal: bool = False
    mask: str = "none"
    keys: int | None = None  # another sequence, of so many keys
    whole_keys: bool = False  # which every rank has
    dropout_p: float = 0.0
    scale: float | None = None
    dtype: torch.dtype = torch.float64

    @property
    def num_keys(self) -> int:
        return self.size if self.keys is None else self.keys

    def placements(self, contexts: int) -> tuple[Placement, Placement]:
        queries = Placement(size=self.size, contexts=contexts, zigzag=self.zigzag)
        if self.keys is None:
            return queries, queries
        return queries, Placement(size=self.keys, contexts=1 if self.whole_keys else contexts, zigzag=self.zigzag)

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v: laid out as projections leave them, heads behind tokens."""
        made = torch.Generator().manual_seed(self.size)
        shapes = [
            (self.samples, self.size, self.heads, self.dim),
            (self.samples, self.num_keys, self.kv_heads, self.dim),
            (self.samples, self.num_keys, self.kv_heads, self.value_dim),
        ]
        q, k, v = (torch.randn(shape, generator=made, dtype=torch.float64).to(self.dtype) for shape in shapes)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def gradient(self) -> torch.Tensor:
        made = torch.Generator().manual_seed(99)
        shape = (self.samples, self.heads, self.size, self.value_dim)
        return torch.randn(shape, generator=made, dtype=torch.float64).to(self.dtype)

    def whole_mask(self) -> torch.Tensor | None:
        rows, columns = self.size, self.num_keys
        made = torch.Generator().manual_seed(5)
        behind = torch.ones(rows, columns, dtype=torch.bool).tril()
        match self.mask:
            case "none":
                return None
            case "boolean":  # two dims
                return torch.rand(rows, columns, generator=made) < 0.6
            case "padding":  # of keys, per sample
                lengths = torch.arange(self.samples) + columns // 2
                return (torch.arange(columns) < lengths[:, None])[:, None, None, :]
            case "padded from the left":  # causal; the first rows of a sample see nothing
                starts = torch.arange(self.samples) * (columns // 3)
                return (torch.arange(columns) >= starts[:, None])[:, None, None, :] & behind
            case "the same, lowest":  # as transformers' eager attention writes it
                hidden = dataclasses.replace(self, mask="padded from the left").whole_mask()
                assert hidden is not None
                return torch.zeros(hidden.shape, dtype=self.dtype).masked_fill(~hidden, torch.finfo(self.dtype).min)
            case "-inf":
                hidden = dataclasses.replace(self, mask="padded from the left").whole_mask()
                assert hidden is not None
                return torch.zeros(hidden.shape, dtype=self.dtype).masked_fill(~hidden, -math.inf)
            case "window":
                return (behind & behind.T.roll(3, 0).logical_or(~behind.tril(-3)))[None, None]
            case "bias":  # per head
                return torch.randn(1, self.heads, rows, columns, generator=made, dtype=torch.float64).to(self.dtype)
            case "bias of samples":
                made_mask = torch.randn(self.samples, 1, rows, columns, generator=made, dtype=torch.float64)
                return made_mask.to(self.dtype)
            case "bias of keys":
                return torch.randn(self.samples, self.heads, 1, columns, generator=made, dtype=torch.float64).to(
                    self.dtype
                )
        raise ValueError(self.mask)

    def expected(self, *, learns_mask: bool = False) -> list[torch.Tensor]:
        """Output and gradients of q, k, v, and of the mask, on one device.

        Of rows that are masked with the lowest number everywhere, torch's CPU kernel forgets in backward how many keys
        they see: its weights are 1, not 1 / n. There, attention written out is what is right.
        """
        leaves = [x.detach().requires_grad_() for x in self.inputs()]
        mask = self.whole_mask()
        if mask is not None and learns_mask:
            mask.requires_grad_()
            leaves.append(mask)
        written_out = self.mask == "the same, lowest"
        with sdpa_kernel(SDPBackend.MATH) if written_out else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(
                leaves[0], leaves[1], leaves[2], attn_mask=mask, dropout_p=self.dropout_p, is_causal=self.is_causal,
                scale=self.scale, enable_gqa=self.heads != self.kv_heads,
            )  # fmt: skip
        return [out.detach(), *torch.autograd.grad(out, leaves, self.gradient())]

    def exact(self) -> list[torch.Tensor]:
        """As `expected`, in float64, of the numbers that this dtype holds."""
        leaves = [x.double().requires_grad_() for x in self.inputs()]
        mask = self.whole_mask()
        mask = mask.double() if mask is not None and mask.is_floating_point() else mask
        out = F.scaled_dot_product_attention(
            leaves[0], leaves[1], leaves[2], attn_mask=mask, is_causal=self.is_causal, scale=self.scale
        )
        return [out.detach(), *torch.autograd.grad(out, leaves, self.gradient().double())]


def on_one_rank(case: Case, attention: Divided, group: Links, *, learns_mask: bool = False) -> list[torch.Tensor]:
    """What one rank has of output and gradients: own tokens, and its share of the mask's."""
    queries, keys = case.placements(group.size)
    here = group.rank
    of_keys = here if keys.contexts > 1 else 0
    q, k, v = case.inputs()
    leaves = [
        queries.own(q, -2, here).detach().requires_grad_(),
        keys.own(k, -2, of_keys).detach().requires_grad_(),
        keys.own(v, -2, of_keys).detach().requires_grad_(),
    ]
    mask = case.whole_mask()
    if mask is not None and learns_mask:
        mask.requires_grad_()
        leaves.append(mask)
    out = attention(
        *leaves[:3], group=group, tokens=queries, keys=None if case.keys is None else keys, mask=mask,
        is_causal=case.is_causal, scale=case.scale, dropout_p=case.dropout_p,
    )  # fmt: skip
    return [out.detach(), *torch.autograd.grad(out, leaves, queries.own(case.gradient(), -2, here))]


def joined(case: Case, parts: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The whole output and gradients, from those of all ranks."""
    queries, keys = case.placements(len(parts))
    placements = [queries, queries, keys, keys]
    whole = []
    for at, given in enumerate(zip(*parts, strict=True)):
        if at < len(placements) and placements[at].contexts > 1:
            whole.append(placements[at].join(given, -2))
        else:
            whole.append(torch.stack(given).sum(0))  # shares
    return whole


def assert_close(got: list[torch.Tensor], expected: list[torch.Tensor], *, tolerance: float) -> None:
    names = ["output", "gradient of q", "gradient of k", "gradient of v", "gradient of the mask"]
    assert len(got) == len(expected)
    for name, one, other in zip(names, got, expected, strict=False):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), name
        error = (one - other).double().norm() / max(other.double().norm().item(), 1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"
