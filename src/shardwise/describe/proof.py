"""What was proven of a divided unit, and how: the key that a proof holds for, as a value. Knows no torch.

A proof holds for one block structure, degree and signature, in training and evaluation; another key is another proof.
"""

from __future__ import annotations

import dataclasses

__all__ = ["Proof"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """Outputs, input gradients, parameter gradients and buffers of a divided unit, compared with the whole unit.

    key         digest of the block's structure, operations and signatures, and the version that it was proven with
    plan        digest of the plan that was proven: another plan of the block has no proof by this one
    signatures  kinds of calls (arguments, shapes, what wants a gradient) that were compared
    modes       "training", "evaluation"
    dropout     whether random numbers were drawn in training, and compared
    error       the largest relative error, in float64 where `on` does not say otherwise
    on          what was compared: "the block", or an instance of the same classes and why
    start_up    whether the ranks prove it once more, on themselves, before the first step
    """

    tp: int
    key: str = ""
    plan: str = ""
    signatures: int = 0
    modes: frozenset[str] = frozenset()
    dropout: bool = False
    error: float = 0.0
    on: str = "the block"
    start_up: bool = False

    def and_run(self, *, training: bool, dropout: bool, error: float, new_signature: bool) -> Proof:
        """This proof with one more comparison in it."""
        return dataclasses.replace(
            self,
            signatures=self.signatures + new_signature,
            modes=self.modes | {"training" if training else "evaluation"},
            dropout=self.dropout or dropout,
            error=max(self.error, error),
        )

    def under(self, key: str, plan: str) -> Proof:
        """The same proof, for the block that `key` says and the plan that `plan` says."""
        return dataclasses.replace(self, key=key, plan=plan)

    def __str__(self) -> str:
        signatures = f"{self.signatures} signature{'s' if self.signatures != 1 else ''}"
        modes = " and ".join(sorted(self.modes, reverse=True)) or "nothing"
        dropout = ", dropout on" if self.dropout else ""
        text = f"{self.on}, {signatures}, {modes}{dropout}, tp={self.tp}: error {self.error:.1e}"
        return f"{text}; again by the ranks at start-up" if self.start_up else text
