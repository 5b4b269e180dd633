"""A unit's call that answers as an equal one did before, without being run: tensors of the same forms, and a gradient
of the right shape for every tensor that had one.

Knows the tensors that units of one rank are given and give: plain ones, tokens of a rank, logits in parts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from shardwise.parallel.tensor.divided_logits import DividedLogits
from shardwise.parallel.tensor.sequence_shard import SequenceShard
from shardwise.trace.alive import LiveCounter

__all__ = ["Template", "answer", "remembered", "signature_of"]


_Wrap = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class _Form:
    """A tensor that the call made."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    storage_bytes: int
    offset: int
    requires_grad: bool
    kept: bool  # saved within the call


@dataclasses.dataclass(frozen=True, slots=True)
class _Leaf:
    """A leaf of the answer. kind: "argument" (its place), "made" (its number), "fixed"."""

    kind: str
    value: Any
    wraps: tuple[_Wrap, ...] = ()  # outermost first


@dataclasses.dataclass(frozen=True, slots=True)
class Template:
    """What a call answered and kept. kept_bytes: of what is not in the answer."""

    node: int
    spec: TreeSpec
    leaves: tuple[_Leaf, ...]
    forms: tuple[_Form, ...]
    keeps: tuple[int, ...]  # places among the arguments that it saves
    kept_bytes: int


def signature_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """All of the arguments but values of tensors and what other objects hold."""
    leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
    return str(spec), tuple(_told(leaf) for leaf in leaves)


def remembered(
    node: int, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, counter: LiveCounter, before: Set[int]
) -> Template | None:
    """What is needed to answer so again; None where the answer has tensors that come from elsewhere. `before`: what was
    saved before the call."""
    given = tree_flatten((tuple(args), dict(kwargs)))[0]
    places = {id(leaf): place for place, leaf in reversed([*enumerate(given)]) if isinstance(leaf, torch.Tensor)}
    leaves, spec = tree_flatten(out)
    told: list[_Leaf] = []
    forms: list[_Form] = []
    made: dict[int, int] = {}  # storage -> number
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            told.append(_Leaf("fixed", leaf))
        elif id(leaf) in places:
            told.append(_Leaf("argument", places[id(leaf)]))
        else:
            wraps, inner = _unwrapped(leaf)
            key = inner.untyped_storage()._cdata
            if not isinstance(inner, FakeTensor) or counter.maker(key) != node or key in made:
                return None
            made[key] = len(forms)
            forms.append(_form(inner, kept=counter.is_kept(key)))
            told.append(_Leaf("made", made[key], wraps))
    keeps = tuple(
        place
        for place, leaf in enumerate(given)
        if isinstance(leaf, torch.Tensor) and _key(leaf) not in before and counter.is_kept(_key(leaf))
    )
    kept = counter.saved_by(node) - sum(counter.size(key) for key in made if counter.is_kept(key))
    return Template(node, spec, tuple(told), tuple(forms), keeps, kept)


def answer(
    template: Template,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    counter: LiveCounter,
    node: int,
    fake: FakeTensorMode,
) -> Any:
    """The answer of a call with the same signature."""
    given = tree_flatten((tuple(args), dict(kwargs)))[0]
    kept = [_unwrapped(given[place])[1] for place in template.keeps]
    for tensor in kept:
        counter.keep(tensor)
    tensors = [_unwrapped(leaf)[1] for leaf in given if isinstance(leaf, torch.Tensor)]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    with torch._C._DisableTorchDispatch():
        tie = FakeTensor(fake, torch.empty(1, device="meta"), torch.device("cpu")).requires_grad_()
    made: Sequence[torch.Tensor] = _Again.apply(fake, template.forms, kept, tie, *wanted) if template.forms else ()  # type: ignore[no-untyped-call]
    counter.claim(node)
    for tensor, form in zip(made, template.forms, strict=True):
        counter.adopt(tensor, node)
        if form.kept:
            counter.keep(tensor)
    leaves = [_leaf(leaf, given, made) for leaf in template.leaves]
    return tree_unflatten(leaves, template.spec)


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        fake: FakeTensorMode,
        forms: Sequence[_Form],
        kept: Sequence[torch.Tensor],
        tie: torch.Tensor,
        *given: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.given = [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in given]
        made = tuple(_made(form, fake) for form in forms)
        saved = [*kept, *[tensor for tensor, form in zip(made, forms, strict=True) if form.kept]]
        ctx.held = [tensor.untyped_storage() for tensor in saved]  # as autograd holds what it saves
        ctx.mark_non_differentiable(*[t for t, form in zip(made, forms, strict=True) if not form.requires_grad])
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        ctx.held = None
        known = next((gradient for gradient in gradients if gradient is not None), None)
        if known is None:
            return None, None, None, None, *[None for _ in ctx.given]
        back = [known.new_empty_strided(shape, strides, dtype=dtype) for shape, strides, dtype in ctx.given]
        return None, None, None, None, *back


def _form(tensor: torch.Tensor, *, kept: bool) -> _Form:
    return _Form(
        shape=tuple(tensor.shape),
        strides=tensor.stride(),
        dtype=tensor.dtype,
        device=tensor.device,
        storage_bytes=tensor.untyped_storage().nbytes(),
        offset=int(tensor.storage_offset()),
        requires_grad=tensor.requires_grad,
        kept=kept,
    )


def _made(form: _Form, fake: FakeTensorMode) -> torch.Tensor:
    with torch._C._DisableTorchDispatch():
        empty = torch.empty_strided(form.shape, form.strides, dtype=form.dtype, device="meta")
        if empty.untyped_storage().nbytes() != form.storage_bytes:
            whole = torch.empty(form.storage_bytes // form.dtype.itemsize, dtype=form.dtype, device="meta")
            empty.set_(whole.untyped_storage(), form.offset, form.shape, form.strides)
    return FakeTensor(fake, empty, form.device)


def _leaf(leaf: _Leaf, given: Sequence[Any], made: Sequence[torch.Tensor]) -> Any:
    if leaf.kind == "fixed":
        return leaf.value
    if leaf.kind == "argument":
        return given[leaf.value]
    tensor = made[leaf.value]
    for wrap in reversed(leaf.wraps):
        tensor = wrap(tensor)
    return tensor


def _unwrapped(leaf: torch.Tensor) -> tuple[tuple[_Wrap, ...], torch.Tensor]:
    """How another tensor is wrapped as this one is, outermost first, and the tensor inside."""
    wraps: list[_Wrap] = []
    while True:
        if isinstance(leaf, SequenceShard):
            wraps.append(functools.partial(SequenceShard, tokens=leaf.tokens, region=leaf.region))
        elif isinstance(leaf, DividedLogits):
            wraps.append(functools.partial(DividedLogits, part=leaf.part, group=leaf.group, reads=leaf.reads))
        else:
            return tuple(wraps), leaf
        leaf = leaf.local


def _key(leaf: torch.Tensor) -> int:
    return int(_unwrapped(leaf)[1].untyped_storage()._cdata)


def _told(leaf: Any) -> Hashable:
    if isinstance(leaf, SequenceShard):
        return "tokens", leaf.tokens, _told(leaf.local)
    if isinstance(leaf, DividedLogits):
        return "logits", leaf.part, _told(leaf.local)
    if isinstance(leaf, torch.Tensor):
        fake = isinstance(leaf, FakeTensor)
        return fake, tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.requires_grad
    if leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype)):
        return leaf
    return type(leaf).__qualname__
