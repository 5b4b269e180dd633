"""How ranks attend to each other's tokens, by name: the functions that do it, as attention rules take them.

What a way does not know (heads that do not fit, tensors of other dims) it leaves to who gathers keys and values. Every
rank decides alike: by shapes of whole tensors. Knows attention of divided sequences; no models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from shardwise.errors import ModelError
from shardwise.parallel.context.attend import Heads
from shardwise.parallel.context.ring import ring_attention
from shardwise.parallel.context.ulysses import ulysses_attention

__all__ = ["RING", "ULYSSES", "Exchanged"]


@dataclasses.dataclass(frozen=True, slots=True)
class Exchanged:
    """Attention by a function of own tokens that exchanges those of the others."""

    function: Callable[..., torch.Tensor]

    def __call__(self, heads: Heads) -> torch.Tensor | None:
        if heads.query.dim() != 4:
            return None
        try:
            return self.function(
                heads.query,
                heads.key,
                heads.value,
                group=heads.group,
                tokens=heads.queries,
                keys=heads.keys,
                mask=heads.mask,
                is_causal=heads.is_causal,
                scale=heads.scale,
                dropout_p=heads.dropout_p,
            )
        except ModelError:
            return None


RING = Exchanged(ring_attention)  # keys and values go round
ULYSSES = Exchanged(ulysses_attention)  # every rank gets all tokens of its heads
