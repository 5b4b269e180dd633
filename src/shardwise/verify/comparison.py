"""The result of a verification, and how the errors in it are measured. Knows no ranks.

Errors per tensor a against the reference b, with n of the N elements of the model and g all gradients:

    gradient   |a - b| / max(|b|, 1e-3 * sqrt(n / N) * |g|)

The floor is there because a true gradient of zero (BERT's key bias) has no relative error: it is a thousandth of
what this tensor's share of the whole gradient would be. Updates of weights are measured alike, in place of g all
updates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping

import torch

from shardwise.describe.tensor import TensorPlan

__all__ = ["FLOOR", "Comparison", "Rounding", "TensorError", "errors_of", "relative"]

FLOOR = 1e-3
_PIECE = 2**20  # elements that are held in float64 at once


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorError:
    """How far one parameter's gradient and its update are from the reference."""

    name: str
    gradient: float
    update: float
    left_out: int = 0  # elements left out of the update's error (AdamW: the gradient is too small to have a direction)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """What float64 says of errors in float32 that are beyond the tolerance: how far from it both sides are.

    `where` is what the layout is off most in, compared with one device; `exact_error` is the layout's largest error
    against one device when both run in float64. See `verify.rounding`.
    """

    where: str
    one_device: float  # in float32, against one device in float64
    layout: float
    most: float  # times `one_device` that `layout` may be
    exact_error: float
    exact_tolerance: float
    dtype: str = "float32"  # in which both sides computed

    @property
    def holds(self) -> bool:
        """Whether the errors are float32's own."""
        return self.layout <= self.most * self.one_device and self.exact_error <= self.exact_tolerance

    def __str__(self) -> str:
        verdict = f"so errors beyond the tolerance are {self.dtype}'s own" if self.holds else "so this is no rounding"
        return (
            f"in float64 the layout is {self.exact_error:.1e} from one device (tolerance {self.exact_tolerance:.0e}); "
            f"in {self.dtype} one device is {self.one_device:.1e} from float64 at {self.where}, "
            f"the layout {self.layout:.1e} (at most {self.most:g} times as far): {verdict}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One device beside a layout. Errors are relative; `tolerance` is what they are held against, with its reason."""

    layout: str
    loss: float
    reference_loss: float
    loss_error: float
    gradient_error: float
    norm_error: float
    weight_error: float
    micro_batch_error: float | None
    exempt: str  # why the whole batch in one forward is not comparable, empty if it is
    tolerance: float
    reason: str
    first_difference: str | None
    tensors: tuple[TensorError, ...]
    edges: tuple[tuple[int, int, int, str], ...]  # (from stage, to stage, bytes a micro-batch, what crosses)
    steps: int
    reference: str = "the whole model on one device"
    experts: tuple[str, ...] = ()  # how experts were divided and what they exchanged, in words
    splits: tuple[str, ...] = ()  # which units split their backward and which do not, in words
    notes: tuple[str, ...] = ()  # what else is to be known of what was compared
    tensor: TensorPlan | None = None  # how units were divided among shards, proven block by block before
    update_tolerance: float | None = None  # of updates, where it is another: AdamW divides gradients by their size
    rounding: Rounding | None = None  # where float32 left something in doubt, what float64 says

    @property
    def equal(self) -> bool:
        """Whether every error is within the tolerance, or float32's own."""
        if self.micro_batch_error is not None and not self.micro_batch_error <= self.tolerance:
            return False
        others = max(self.loss_error, self.gradient_error, self.norm_error)
        if self.update_tolerance is not None and others <= self.tolerance:
            return self.weight_error <= self.update_tolerance
        return self.worst_error <= self.tolerance or (self.rounding is not None and self.rounding.holds)

    @property
    def worst_error(self) -> float:
        """The largest error of the layout: of loss, gradients, their norm and updates."""
        errors = (self.loss_error, self.gradient_error, self.norm_error, self.weight_error)
        return math.inf if any(math.isnan(error) for error in errors) else max(errors)

    def __str__(self) -> str:
        rows = [
            ("loss", f"{self.loss:.9g}", f"{self.reference_loss:.9g}", self.loss_error),
            ("gradient, worst tensor", "", "", self.gradient_error),
            ("gradient norm", "", "", self.norm_error),
            (
                f"weights after {self.steps} step{'s' if self.steps > 1 else ''}, worst tensor",
                "",
                "",
                self.weight_error,
            ),
        ]
        lines = [f"{self.layout} against {self.reference}", ""]
        lines.append(f"  {'':38s} {'layout':>14s} {'one device':>14s} {'error':>9s}")
        lines += [f"  {what:38s} {a:>14s} {b:>14s} {error:9.1e}" for what, a, b, error in rows]
        if self.micro_batch_error is not None:
            lines.append(
                f"  {'micro-batches against one forward':38s} {'':>14s} {'':>14s} {self.micro_batch_error:9.1e}"
            )
        else:
            lines.append(f"  micro-batches against one forward: not comparable, {self.exempt}")
        for source, target, nbytes, what in self.edges:
            lines.append(f"  edge stage {source} -> {target}: {nbytes:,} bytes a micro-batch: {what}")
        if self.tensor is not None:
            lines += [f"  {line}" for line in self.tensor.lines()]
        lines += [f"  {line}" for line in (*self.experts, *self.splits, *self.notes)]
        lines.append(f"  tolerance {self.tolerance:.0e}: {self.reason}")
        if self.update_tolerance is not None:
            lines.append(f"  tolerance of updates {self.update_tolerance:.0e}: AdamW divides gradients by their size")
        if self.rounding is not None:
            lines.append(f"  {self.rounding}")
        lines.append("")
        if self.equal:
            lines.append(f"equal: {len(self.tensors)} parameters, worst gradient error {self.gradient_error:.1e}")
        else:
            lines.append(f"NOT EQUAL: {self.first_difference}")
            worst = sorted(self.tensors, key=lambda t: -max(t.gradient, t.update))[:8]
            lines += [f"  {t.name:50s} gradient {t.gradient:8.1e}  update {t.update:8.1e}" for t in worst]
        return "\n".join(lines)


def relative(a: float, b: float) -> float:
    """|a - b| / |b|; infinite where a is no number."""
    if not math.isfinite(a):
        return 0.0 if a == b else math.inf
    return abs(a - b) / max(abs(b), 1e-12)


def errors_of(
    gradients: Mapping[str, torch.Tensor | None],
    updates: Mapping[str, torch.Tensor],
    reference_gradients: Mapping[str, torch.Tensor | None],
    reference_updates: Mapping[str, torch.Tensor],
    *,
    by_sign: bool | Collection[str],
    roundings: Mapping[str, float] | None = None,
    distances: Mapping[str, float] | None = None,
) -> tuple[TensorError, ...]:
    """The errors of every parameter. `by_sign`: the optimizer normalises (AdamW), all or those named, so that elements
    whose reference gradient is below the floor have no meaningful update and are left out. `roundings`: norms that the
    stored weights' own rounding may add to a difference of updates; less than that is no difference. `distances`: how
    far further copies of a gradient are from the reference; the farthest counts. Tensors are asked for one at a time,
    so that they may lie in files; a gradient that is missing is None."""
    total = sum(update.numel() for update in reference_updates.values()) or 1
    norm = _norm(reference_gradients.values())
    update_norm = _norm(reference_updates.values())
    errors: list[TensorError] = []
    for name, reference_update in reference_updates.items():
        share = FLOOR * math.sqrt(reference_update.numel() / total)
        gradient = reference_gradients.get(name)
        normalised = by_sign if isinstance(by_sign, bool) else name in by_sign
        least = FLOOR * norm / math.sqrt(total) if normalised and gradient is not None else None
        distance = _distance(updates[name], reference_update, gradient, least)
        of_gradient = _distance(gradients.get(name), gradient)
        farthest = max(of_gradient.difference, (distances or {}).get(name, 0.0))
        errors.append(
            TensorError(
                name=name,
                gradient=_error(dataclasses.replace(of_gradient, difference=farthest), share * norm),
                update=_error(distance, share * update_norm, (roundings or {}).get(name, 0.0)),
                left_out=distance.left_out,
            )
        )
    return tuple(errors)


@dataclasses.dataclass(frozen=True, slots=True)
class _Distance:
    """|a - b| and |b|, without the elements that are left out."""

    difference: float
    reference: float
    left_out: int = 0


def _distance(
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    gradient: torch.Tensor | None = None,
    least: float | None = None,
) -> _Distance:
    """In float64, a piece at a time; with `least`, of the elements alone whose gradient is at least as large."""
    if a is None or b is None:
        only = _norm([a, b])
        return _Distance(only, 0.0 if b is None else only)
    difference = reference = 0.0
    left_out = 0
    for start in range(0, b.numel(), _PIECE):
        x, y = _piece(a, start), _piece(b, start)
        if least is not None and gradient is not None:
            clear = _piece(gradient, start).abs() >= least
            left_out += int((~clear).sum())
            x, y = x * clear, y * clear
        difference += float((x - y).square().sum())
        reference += float(y.square().sum())
    return _Distance(math.sqrt(difference), math.sqrt(reference), left_out)


def _piece(tensor: torch.Tensor, start: int) -> torch.Tensor:
    return tensor.reshape(-1)[start : start + _PIECE].double()


def _norm(tensors: Iterable[torch.Tensor | None]) -> float:
    """Of all elements of all tensors."""
    norms = [float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in tensors if t is not None]
    return math.sqrt(sum(norm * norm for norm in norms))


def _error(distance: _Distance, floor: float, rounding: float = 0.0) -> float:
    if not math.isfinite(distance.difference):
        return math.inf
    difference = max(0.0, distance.difference - rounding)
    scale = max(distance.reference, floor)
    return difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf)
