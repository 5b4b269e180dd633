"""What a loss weighs, and where it is found in what a model returns."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shardwise.errors import ConfigError
from shardwise.tasks import IGNORED_LABEL, batch_size, label_count, loss_of, next_token_loss

LABELS = torch.tensor([[1, 2, IGNORED_LABEL, 3], [4, IGNORED_LABEL, IGNORED_LABEL, IGNORED_LABEL]])


@dataclass
class Returned:
    loss: Tensor | None = None
    logits: Tensor | None = None


def test_the_weight_is_the_labels_that_count_and_survive_the_shift() -> None:
    assert label_count({"labels": LABELS}) == 4
    assert label_count({"labels": LABELS}, shifted=True) == 2


def test_without_labels_the_weight_is_the_samples() -> None:
    batch = {"scale": torch.tensor(2.0), "pixels": torch.zeros(5, 3, 8, 8)}
    assert label_count(batch) == label_count(batch, shifted=True) == batch_size(batch) == 5
    with pytest.raises(ConfigError, match="sample dim"):
        batch_size({"scale": torch.tensor(2.0)})


@pytest.mark.parametrize("outputs", [Returned(loss=torch.tensor(1.5)), {"loss": torch.tensor(1.5)}])
def test_a_returned_loss_is_taken(outputs: object) -> None:
    assert loss_of(outputs).item() == 1.5
    assert next_token_loss(outputs, {"labels": LABELS}).item() == 1.5


def test_the_loss_of_transformers_outputs_is_taken() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs").CausalLMOutput
    assert loss_of(outputs(loss=torch.tensor(1.5), logits=torch.zeros(1))).item() == 1.5
    with pytest.raises(ConfigError, match="CausalLMOutput"):
        loss_of(outputs(logits=torch.zeros(1)))


@pytest.mark.parametrize("outputs", [Returned(), {"logits": torch.zeros(1)}, torch.zeros(1), None, (1, 2)])
def test_a_missing_loss_is_an_error_that_says_what_came(outputs: object) -> None:
    with pytest.raises(ConfigError, match=type(outputs).__name__):
        loss_of(outputs)


def test_a_loss_per_sample_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"shape \(3,\)"):
        loss_of({"loss": torch.zeros(3)})


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"logits": x}, lambda x: Returned(logits=x)])
def test_logits_are_scored_against_the_next_label(wrap: "type[Returned]") -> None:
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = (
        F.cross_entropy(logits[0, 0:1], torch.tensor([2])) + F.cross_entropy(logits[0, 2:3], torch.tensor([3]))
    ) / 2
    assert next_token_loss(wrap(logits), {"labels": LABELS}).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_mean_over_a_batch_is_the_weighted_mean_over_its_parts() -> None:
    logits = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.randint(0, 6, (4, 5), generator=torch.Generator().manual_seed(1))
    labels[0, 2:] = IGNORED_LABEL
    labels[1, :] = IGNORED_LABEL  # a part that weighs nothing must not make the sum NaN
    parts = [
        (
            next_token_loss(logits[r : r + 1], {"labels": labels[r : r + 1]}),
            label_count({"labels": labels[r : r + 1]}, shifted=True),
        )
        for r in range(4)
    ]
    mean = sum(loss.item() * weight for loss, weight in parts) / sum(weight for _, weight in parts)
    assert parts[1][1] == 0
    assert mean == pytest.approx(next_token_loss(logits, {"labels": labels}).item(), rel=1e-12)


def test_half_precision_is_scored_in_float32_and_double_stays_double() -> None:
    logits = torch.zeros(2, 4, 6)
    assert next_token_loss(logits.bfloat16(), {"labels": LABELS}).dtype == torch.float32
    assert next_token_loss(logits.double(), {"labels": LABELS}).dtype == torch.float64


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"shape \(2, 6\)"):
        next_token_loss(torch.zeros(2, 6), {"labels": LABELS})
    with pytest.raises(ConfigError, match="NoneType"):
        next_token_loss(None, {"labels": LABELS})
