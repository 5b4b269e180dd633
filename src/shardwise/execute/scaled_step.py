"""An optimizer's step with gradients multiplied by a factor, as clipping does, in the pass that reads them anyway.

    apart    g ← f g: a pass that reads and writes every gradient, then the update's, which reads it again
    fused    the update's own kernel takes g / (1 / f), and writes it back: a quarter of that pass

Knows torch's optimizers, by the protocol that its `GradScaler` uses (`grad_scale`). Refuses to know clipping.
"""

from __future__ import annotations

import torch

from shardwise.execute.held import Held

__all__ = ["step_scaled"]

_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


def step_scaled(program: Held, optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Update the program's states, all of which are the optimizer's, by `factor` (above 0) times their gradients.

    The gradients are the scaled ones behind it. A factor of 1 is a plain step.
    """
    if factor == 1.0:
        optimizer.step()
    elif type(optimizer) in _FUSED and all(group["fused"] for group in optimizer.param_groups):
        device = next(own.device for group in optimizer.param_groups for own in group["params"])
        vars(optimizer)["grad_scale"] = torch.full((), 1.0 / factor, device=device)
        try:
            optimizer.step()
        finally:
            del vars(optimizer)["grad_scale"]
    else:
        program.scale_gradients(factor)
        optimizer.step()
