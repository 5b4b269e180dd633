"""The optimizer over what a rank holds of a model's state. Knows states and options; refuses to know who has the rest.

adamw      fused, one call for matrices and one for vectors, which do not decay (Loshchilov and Hutter, ICLR 2019)
sgd        plain gradient descent: keeps no state
momentum   gradient descent with Nesterov momentum, or the heavy ball (Sutskever et al. 2013)
muon       hidden matrices by orthogonal updates, the rest by AdamW (`optimizers.muon`)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shardwise.errors import ConfigError
from shardwise.execute.program import Program
from shardwise.parallel.states import State
from shardwise.train.optimizers import MOMENTS
from shardwise.train.optimizers.hidden import hidden_matrices
from shardwise.train.optimizers.host_adamw import HostAdamW
from shardwise.train.optimizers.matrices import matrices_of
from shardwise.train.optimizers.muon import Muon
from shardwise.train.run_tables import TrainingOptions

__all__ = ["optimizer_for", "optimizer_of", "optimizer_over", "set_rate"]


def optimizer_for(program: Program, options: TrainingOptions, *, on_host: bool = False) -> torch.optim.Optimizer | None:
    """The optimizer that a run asks for, over a program's states; see `optimizer_of`."""
    return optimizer_of(
        program,
        name=options.optimizer,
        betas=options.betas,
        epsilon=options.epsilon,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        nesterov=options.nesterov,
        on_host=on_host,
    )


def optimizer_over(
    states: Mapping[str, State],
    *,
    name: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.95),
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    nesterov: bool = True,
    on_host: bool = False,
) -> torch.optim.Optimizer | None:
    """AdamW, or gradient descent with or without momentum; None where nothing is trained here.

    Biases, norms and other parameters of one dim do not decay. The rate is set before every step (`set_rate`).
    on_host: AdamW's moments wait in the host's memory. Raises ConfigError for other optimizers that remember something.
    """
    if on_host and name not in ("adamw", "sgd"):
        raise ConfigError(
            f"what AdamW remembers can wait on the host, but optimizer={name!r} and the layout says offload=optimizer; "
            "use adamw, or another offload"
        )
    groups = [
        {"params": [state.parameter for state in states.values() if state.is_matrix], "weight_decay": weight_decay},
        {"params": [state.parameter for state in states.values() if not state.is_matrix], "weight_decay": 0.0},
    ]
    filled: list[dict[str, Any]] = [group for group in groups if group["params"]]
    if not filled:
        return None
    if name == "sgd":
        return torch.optim.SGD(filled, lr=0.0, fused=True)
    if name == "momentum":
        return torch.optim.SGD(filled, lr=0.0, momentum=momentum, nesterov=nesterov, fused=True)
    if name != "adamw":
        raise ConfigError(
            f"optimizer={name!r} is not one of {', '.join(MOMENTS)}, or needs the program; see optimizer_of"
        )
    if on_host:
        return HostAdamW(filled, betas=betas, epsilon=epsilon)
    return torch.optim.AdamW(filled, lr=0.0, betas=betas, eps=epsilon, fused=True)


def optimizer_of(
    program: Program,
    *,
    name: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.95),
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float | None = None,
    nesterov: bool = True,
    on_host: bool = False,
) -> torch.optim.Optimizer | None:
    """The optimizer over a program's states, one of `optimizers.MOMENTS`; None where nothing is trained here.

    momentum: None: 0.95 for Muon, else 0.9. Collective for Muon, as are its steps. on_host: see `optimizer_over`.
    """
    states = program.states
    if name != "muon":
        return optimizer_over(
            states,
            name=name,
            betas=betas,
            epsilon=epsilon,
            weight_decay=weight_decay,
            momentum=0.9 if momentum is None else momentum,
            nesterov=nesterov,
            on_host=on_host,
        )
    if on_host:
        optimizer_over(states, name=name, on_host=True)
    hidden = hidden_matrices(program)
    rest = {own: state for own, state in states.items() if own not in hidden}
    return Muon(
        states,
        hidden,
        matrices=matrices_of(program, sorted(hidden)),
        others=optimizer_over(rest, betas=betas, epsilon=epsilon, weight_decay=weight_decay),
        momentum=0.95 if momentum is None else momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step, for every parameter."""
    for group in optimizer.param_groups:
        group["lr"] = rate
