"""Workers in a plan: how many there are, and what they exchange. Knows a run and a model's sizes."""

from __future__ import annotations

import torch.nn as nn

from shardwise.quantities import format_bytes
from shardwise.train.run_file import Run

__all__ = ["workers_note"]

_BYTES = 4  # of an element, as it is exchanged


def workers_note(run: Run, model: nn.Module) -> str:
    """Further lines of a plan; empty where replicas sum their gradients in every step."""
    options = run.asynchronous
    if options is None:
        return ""
    ranks = run.layout.world_size // run.num_workers
    sent = sum(p.numel() for p in model.parameters() if p.requires_grad) * _BYTES
    parts = f", in {options.fragments} parts one behind the other" if options.fragments > 1 else ""
    wire = f", compressed by {options.wire}" if options.wire != "none" else ""
    return (
        f"\nworkers       {run.num_workers} of {ranks} rank{'s' if ranks > 1 else ''}, each laid out as above, that "
        f"train by themselves; {options.method} every {options.every} steps:\n"
        f"              {format_bytes(sent)} of each worker are summed{parts}{wire}; nothing between"
    )
