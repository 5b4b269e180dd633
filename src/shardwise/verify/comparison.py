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
from collections.abc import Iterable, Mapping

import torch

__all__ = ["FLOOR", "Comparison", "TensorError", "errors_of", "relative"]

FLOOR = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorError:
    """How far one parameter's gradient and its update are from the reference."""

    name: str
    gradient: float
    update: float
    left_out: int = 0  # elements left out of the update's error (AdamW: the gradient is too small to have a direction)


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

    @property
    def equal(self) -> bool:
        """Whether every error is within the tolerance."""
        errors = [self.loss_error, self.gradient_error, self.norm_error, self.weight_error]
        if self.micro_batch_error is not None:
            errors.append(self.micro_batch_error)
        return all(error <= self.tolerance for error in errors)

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
        lines.append(f"  tolerance {self.tolerance:.0e}: {self.reason}")
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
    by_sign: bool,
    roundings: Mapping[str, float] | None = None,
) -> tuple[TensorError, ...]:
    """The errors of every parameter. `by_sign`: the optimizer normalises (AdamW), so that elements whose reference
    gradient is below the floor have no meaningful update and are left out. `roundings`: norms that the stored weights'
    own rounding may add to a difference of updates; less than that is no difference."""
    total = sum(update.numel() for update in reference_updates.values()) or 1
    norm = _norm(reference_gradients.values())
    update_norm = _norm(reference_updates.values())
    errors: list[TensorError] = []
    for name, reference_update in reference_updates.items():
        share = FLOOR * math.sqrt(reference_update.numel() / total)
        left_out = 0
        update, wanted = updates[name].double(), reference_update.double()
        gradient = reference_gradients[name]
        if by_sign and gradient is not None:
            clear = gradient.abs().double() >= FLOOR * norm / math.sqrt(total)
            left_out = int((~clear).sum().item())
            update, wanted = update * clear, wanted * clear
        errors.append(
            TensorError(
                name=name,
                gradient=_error(gradients.get(name), gradient, share * norm),
                update=_error(update, wanted, share * update_norm, (roundings or {}).get(name, 0.0)),
                left_out=left_out,
            )
        )
    return tuple(errors)


def _norm(tensors: Iterable[torch.Tensor | None]) -> float:
    squares = [float(t.double().square().sum()) for t in tensors if t is not None]
    return math.sqrt(sum(squares))


def _error(a: torch.Tensor | None, b: torch.Tensor | None, floor: float, rounding: float = 0.0) -> float:
    if a is None and b is None:
        return 0.0
    left = torch.zeros((), dtype=torch.float64) if a is None else a.double()
    right = torch.zeros((), dtype=torch.float64) if b is None else b.double()
    difference = float((left - right).norm())
    if not math.isfinite(difference):
        return math.inf
    difference = max(0.0, difference - rounding)
    scale = max(float(right.norm()), floor)
    return difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf)
