"""Both ways to split a backward, and whole ones, have the same gradients, and phases are told one by one."""

from __future__ import annotations

import torch

from benchmarks.schedules.split_backward.sides import PHASES, SIDES, blocks, run


def test_all_sides_compute_the_same_gradients() -> None:
    gradients: dict[str, list[torch.Tensor]] = {}
    x = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0))
    for name, side_of in SIDES.items():
        model = blocks(2, 64)
        side = side_of(model)
        for _ in range(2):
            assert len(list(run(model, side, x))) == len(PHASES)
        gradients[name] = [p.grad for p in model.parameters() if p.grad is not None]
    for name, found in gradients.items():
        for mine, other in zip(found, gradients["torch whole"], strict=True):
            assert (mine - other).norm() <= 1e-5 * other.norm(), name
