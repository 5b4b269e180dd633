"""Random calls of a model, replaced so that their numbers do not depend on the layout.

Per sample, one generator seeded by (seed, step, place, call, index of the draw, sample) draws the sample's
rows as a whole; a draw whose dim 0 is not made of the samples has one key with the micro-batch in it. So 8
samples at once, 2 × 4 and 4 × 2 draw the same dropout masks. It knows single calls; where units begin and end
is known to who opens the mode.

    from (B·k, ...) it follows that sample b owns rows [b·k, (b+1)·k)

Operations whose fused form chooses its own numbers (attention, recurrent layers on accelerators) are run
unfused. Calls that are given a generator of their own are not touched.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from shardwise.trace.multi_head import multi_head_attention
from shardwise.trace.random_calls import is_random
from shardwise.trace.random_ops import KeyedOps
from shardwise.trace.random_streams import Generators, Scope, Stream, python_streams

__all__ = ["Attends", "Generators", "RandomMode", "Scope", "draw", "is_random", "python_streams", "repeated_draws"]

_DROPOUT = frozenset({F.dropout, torch.dropout, torch.dropout_})
# Recurrent layers compute on (tokens, batch, hidden), whatever batch_first says.
_TIME_FIRST = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})


def draw(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    scope: Scope,
    index: int,
    generators: Generators | None = None,
) -> Any:
    """The result of the random call `func(*args, **kwargs)` (see `is_random`), drawn from (scope, index).

    Differentiable as the call itself is; in-place calls write in place. `generators` are made when none are
    given. Raises ModelError for an operation whose numbers cannot be chosen.
    """
    kwargs = kwargs or {}
    generators = Generators() if generators is None else generators
    if func in _DROPOUT:
        return _dropout(func, args, kwargs, Stream(scope=scope, index=(index, 0), generators=generators))
    if func is F.scaled_dot_product_attention:
        return _attention(Stream(scope=scope, index=(index, 0), generators=generators), *args, **kwargs)
    sample_dim = 1 if func in _TIME_FIRST else 0
    with _unfused(args), KeyedOps(scope=scope, index=index, generators=generators, sample_dim=sample_dim):
        return func(*args, **kwargs)


class Attends:
    """A tensor of which only a part is here, and whose queries find the weights' dropout by themselves."""

    def attend(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What attention with dropout gives for these arguments, drawn by one call of dropout of all weights;
        NotImplemented where it does not know how."""
        return NotImplemented


class RandomMode(TorchFunctionMode):
    """Inside, every random torch call is drawn from (scope, number of the random call inside).

    `index` is the number of the next one. `generators` are reused where the caller keeps some.
    """

    def __init__(self, scope: Scope, *, first_index: int = 0, generators: Generators | None = None) -> None:
        super().__init__()
        self.scope = scope
        self.index = first_index
        self._generators = Generators() if generators is None else generators

    def again(self) -> RandomMode:
        """A mode that draws what this one draws from here on, for a part that is run a second time.

        For `torch.utils.checkpoint`, whose recompute runs in backward, when the mode of the forward is over:
        `checkpoint(f, x, use_reentrant=False, context_fn=lambda: (nullcontext(), mode.again()))`.
        """
        return RandomMode(self.scope, first_index=self.index)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not is_random(func, args, kwargs):
            return func(*args, **kwargs) if kwargs else func(*args)
        if func is F.multi_head_attention_forward:
            with self:  # what it draws is a call of its own, of the samples' heads
                return multi_head_attention(*args, **(kwargs or {}))
        index = self.index
        self.index += 1
        query = args[0] if args else None
        if func is F.scaled_dot_product_attention and isinstance(query, Attends):
            with RandomMode(self.scope, first_index=index, generators=self._generators):
                made = query.attend(args, kwargs or {})
            if made is not NotImplemented:
                return made
        return draw(func, args, kwargs, scope=self.scope, index=index, generators=self._generators)


def repeated_draws(mode: RandomMode | None) -> contextlib.AbstractContextManager[Any]:
    """Draws of the torch, numpy and Python generators from here on, for a part that is run a second time."""
    if mode is None:
        return contextlib.nullcontext()
    again, host = mode.again(), (random.getstate(), np.random.get_state(), torch.default_generator.get_state())

    @contextlib.contextmanager
    def repeated() -> Iterator[None]:
        now = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
        random.setstate(host[0])
        np.random.set_state(host[1])
        torch.default_generator.set_state(host[2])
        try:
            with again:
                yield
        finally:
            random.setstate(now[0])
            np.random.set_state(now[1])
            torch.default_generator.set_state(now[2])

    return repeated()


@contextlib.contextmanager
def _unfused(args: tuple[Any, ...]) -> Iterator[None]:
    """Fused attention and recurrent layers, which composites may hold, choose their own dropout masks."""
    first = args[0] if args else None
    if not isinstance(first, torch.Tensor) or first.device.type == "cpu":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


def _dropout(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], stream: Stream) -> Any:
    """Inverted dropout (Srivastava et al. 2014, section 10): kept values are scaled by 1 / (1 - p)."""
    x = args[0] if args else kwargs["input"]
    p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    in_place = func is torch.dropout_ or bool(args[3] if len(args) > 3 else kwargs.get("inplace", False))
    if p > 1:
        return func(*args, **kwargs)  # raises torch's own error
    noise = stream.keep_mask(x.new_empty(x.shape), 1 - p)
    if p < 1:
        noise.div_(1 - p)
    return x.mul_(noise) if in_place else x * noise


def _attention(
    stream: Stream,
    query: torch.Tensor,  # (..., heads, queries, head_dim)
    key: torch.Tensor,  # (..., kv_heads, keys, head_dim)
    value: torch.Tensor,  # (..., kv_heads, keys, value_dim)
    attn_mask: torch.Tensor | None = None,  # broadcasts to (..., heads, queries, keys); False or -inf: not seen
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention written out (Vaswani et al. 2017, equation 1), dropout on the softmax.

    As torch's own: half types are computed in float32, and a query that sees no key gets zeros.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    dtype = torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query.to(dtype) * scale) @ key.to(dtype).transpose(-2, -1)  # (..., heads, queries, keys)
    if is_causal:
        unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(unseen, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(attn_mask.logical_not(), -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    seen = torch._safe_softmax(scores, -1) if attn_mask is not None else scores.softmax(-1)
    noise = stream.keep_mask(seen.new_empty(seen.shape), 1 - dropout_p)
    if dropout_p < 1:
        noise.div_(1 - dropout_p)
    return (seen * noise @ value.to(dtype)).to(query.dtype)
