"""What shardwise asks of a task: samples by number, a loss, what a loss weighs, and what to report.

Values in, values out. A task knows its data and its loss; it refuses to know ranks, layouts, micro-batches,
devices and optimizers, so the same object serves one device and every layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from shardwise.errors import ConfigError

__all__ = [
    "IGNORED_LABEL",
    "SPLITS",
    "Batch",
    "Counted",
    "Described",
    "Split",
    "Task",
    "batch_size",
    "check_indices",
    "class_loss",
    "label_count",
    "logits_of",
    "loss_of",
    "next_token_loss",
    "perplexity",
]

Split = Literal["train", "held_out"]
Batch = Mapping[str, Tensor]

SPLITS: tuple[Split, ...] = get_args(Split)
IGNORED_LABEL = -100  # torch's and transformers' convention: a label that is not counted


class Task(Protocol):
    """Data, loss and metrics of one training problem.

    The loss of a global batch is the mean of its micro-batches' losses weighted by `weight`, so `loss` has to
    be a mean over what `weight` counts.
    """

    def num_samples(self, split: Split) -> int:
        """Number of samples of a split; 0 where there is no such split."""
        ...

    def samples(self, indices: Sequence[int], split: Split) -> dict[str, Tensor]:
        """Collated samples on the CPU; dim 0 of every tensor is len(indices), in the order of `indices`.

        Tensors without dims speak of these samples together, as `num_items_in_batch` does.
        """
        ...

    def loss(self, outputs: object, batch: Batch) -> Tensor:
        """Scalar mean loss of what the model returned for `batch`."""
        ...

    def weight(self, batch: Batch) -> float:
        """How many equal terms the mean in `loss` has: labels that count, or samples."""
        ...

    def metrics(self, loss: float) -> dict[str, float]:
        """Figures to show beside a mean loss, by name; may be empty."""
        ...


@runtime_checkable
class Counted(Protocol):
    """A task that says what `weight` counts, in the plural: "tokens", "images". Its speed is told in these; that of
    another task in samples."""

    @property
    def counts(self) -> str: ...


@runtime_checkable
class Described(Protocol):
    """A task that has more to say of its data than how many samples there are."""

    def about(self) -> str: ...


@runtime_checkable
class _WithLoss(Protocol):
    loss: Tensor | None


@runtime_checkable
class _WithLogits(Protocol):
    logits: Tensor


def loss_of(outputs: object) -> Tensor:
    """The scalar loss that a model returned: `outputs.loss` or `outputs["loss"]`.

    Raises ConfigError where there is none, or where it is not a scalar.
    """
    loss = _returned_loss(outputs)
    if loss is None:
        raise ConfigError(
            "a task without a loss of its own needs a model that returns one; "
            f"{type(outputs).__name__} has no `loss`; pass labels to the model, or give the task a loss"
        )
    if loss.dim() != 0:
        raise ConfigError(
            f"a loss is one number; the model returned a loss of shape {tuple(loss.shape)}; return its mean"
        )
    return loss


def next_token_loss(outputs: object, batch: Batch) -> Tensor:
    """Scalar loss of a causal language model: the one it returned, else cross entropy of its logits.

    Logits (batch, tokens, vocabulary) are `outputs` itself, `outputs.logits` or `outputs["logits"]`; the
    logits at token t predict `labels` at t + 1, and labels of IGNORED_LABEL do not count. Half precision is
    computed in float32. The loss is 0, not NaN, where no label counts.
    """
    if _returned_loss(outputs) is not None:
        return loss_of(outputs)
    logits = _returned_logits(outputs)  # (batch, tokens, vocabulary)
    if logits is None or logits.dim() != 3:
        found = "" if logits is None else f" with logits of shape {tuple(logits.shape)}"
        raise ConfigError(
            "a language model returns a loss or logits of shape (batch, tokens, vocabulary); "
            f"got {type(outputs).__name__}{found}; return one of them"
        )
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    targets = batch["labels"].to(logits.device)[:, 1:].flatten()  # (batch * (tokens - 1),)
    scores = logits[:, :-1].flatten(0, 1)  # (batch * (tokens - 1), vocabulary)
    total = torch.nn.functional.cross_entropy(scores, targets, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / (targets != IGNORED_LABEL).sum().clamp(min=1)


def class_loss(outputs: object, batch: Batch) -> Tensor:
    """Scalar loss of a model that tells classes apart: the one it returned, else cross entropy of its logits.

    Logits are (batch, …, classes), see `logits_of`; labels are (batch, …), of which IGNORED_LABEL does not count. Half
    precision is computed in float32. The loss is 0, not NaN, where no label counts.
    """
    if _returned_loss(outputs) is not None:
        return loss_of(outputs)
    logits = logits_of(outputs)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    targets = batch["labels"].to(logits.device).flatten()
    scores = logits.reshape(-1, logits.shape[-1])
    total = torch.nn.functional.cross_entropy(scores, targets, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / (targets != IGNORED_LABEL).sum().clamp(min=1)


def logits_of(outputs: object) -> Tensor:
    """The logits that a model returned: `outputs` itself, `outputs.logits` or `outputs["logits"]`.

    Raises ConfigError where there are none.
    """
    logits = _returned_logits(outputs)
    if logits is None:
        raise ConfigError(f"a model that tells classes apart returns logits; got {type(outputs).__name__}; return them")
    return logits


def label_count(batch: Batch, *, shifted: bool = False) -> float:
    """Number of labels that count; of samples where the batch has no `labels`.

    `shifted` is for next-token losses, where the model predicts labels[:, 1:] and the first label of each
    sample is never asked for.
    """
    labels = batch.get("labels")
    if labels is None:
        return float(batch_size(batch))
    asked = labels[:, 1:] if shifted else labels
    return float((asked != IGNORED_LABEL).sum().item())


def batch_size(batch: Batch) -> int:
    """Dim 0 of the batch's tensors. Raises ConfigError for a batch without tensors that have one."""
    sizes = [tensor.shape[0] for tensor in batch.values() if tensor.dim() > 0]
    if not sizes:
        raise ConfigError("a batch holds at least one tensor with a sample dim; this one holds none")
    return sizes[0]


def check_indices(indices: Sequence[int], *, num_samples: int, split: Split) -> None:
    """Raise ConfigError for a sample number that the split does not have."""
    if indices and not num_samples:
        raise ConfigError(f"the split {split} has 0 samples; {len(indices)} were asked for; give more data or skip it")
    for i in indices:
        if not 0 <= i < num_samples:
            raise ConfigError(f"samples of {split} are numbered 0 to {num_samples - 1}; got {i}; use sample_indices")


def perplexity(loss: float) -> float:
    """exp(loss) of a loss in nats per token; infinity where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _returned_loss(outputs: object) -> Tensor | None:
    if isinstance(outputs, Mapping):  # transformers' outputs are mappings that leave out what is None
        found = outputs.get("loss")
    else:
        found = outputs.loss if isinstance(outputs, _WithLoss) else None
    return found if isinstance(found, Tensor) else None


def _returned_logits(outputs: object) -> Tensor | None:
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        found = outputs.get("logits")
    else:
        found = outputs.logits if isinstance(outputs, _WithLogits) else None
    return found if isinstance(found, Tensor) else None
