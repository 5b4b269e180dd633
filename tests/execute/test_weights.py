"""What a micro-batch weighs, and the number of items that a batch brings along."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from transformers import LlamaConfig, LlamaForCausalLM

from shardwise.errors import BatchError
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.execute.weights import ITEMS, weigher
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.testing import on_ranks
from shardwise.trace.objective import objective

LABELS = torch.tensor([[5, 1, 2, -100], [-100, 1, -100, -100], [3, 3, 3, 3], [-100, -100, -100, -100]])


class ForConditionalGeneration(nn.Module):
    """What `weigher` asks of transformers' models."""

    def __init__(self, *, is_encoder_decoder: bool) -> None:
        super().__init__()
        self.loss_type = "ForConditionalGeneration"
        self.config = SimpleNamespace(is_encoder_decoder=is_encoder_decoder)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    )


def test_labels_count_and_the_first_of_a_sequence_only_where_it_is_predicted() -> None:
    batch = {"input_ids": torch.zeros(4, 4, dtype=torch.long), "labels": LABELS}
    assert weigher(llama())(batch) == 6
    assert weigher(nn.Linear(1, 1))(batch) == 8
    assert weigher(ForConditionalGeneration(is_encoder_decoder=False))(batch) == 6
    assert weigher(ForConditionalGeneration(is_encoder_decoder=True))(batch) == 8


def test_labels_that_are_shifted_already_count_as_they_are() -> None:
    batch = {"input_ids": torch.zeros(4, 4, dtype=torch.long), "labels": LABELS, "shift_labels": LABELS}
    assert weigher(llama())(batch) == 8


def test_samples_count_where_there_are_no_labels() -> None:
    assert weigher(nn.Linear(1, 1))({"scale": torch.tensor(2.0), "x": torch.zeros(3, 2)}) == 3
    assert weigher(nn.Linear(1, 1))((torch.zeros(5, 2),)) == 5


@pytest.mark.parametrize(
    "parts",
    [
        [{"labels": LABELS[:2]}, {"labels": LABELS[2:]}],
        [{"labels": LABELS[:1]}, {"labels": LABELS[1:]}],
        [{"labels": LABELS[0]}, {"labels": LABELS[3]}],
        [{"labels": torch.tensor(3)}, {"labels": torch.tensor(-100)}],
        [{"labels": LABELS[:2]}, {"shift_labels": LABELS[:2], "labels": LABELS[:2]}],
        [{"labels": torch.zeros(2, 3)}, {"labels": LABELS[:2]}],
        [(torch.zeros(5, 2),), (torch.zeros(1, 2),)],
    ],
)
def test_parts_weigh_what_each_weighs_alone(parts) -> None:
    for weight in (weigher(llama()), weigher(nn.Linear(1, 1))):
        assert weight.of_parts(parts) == [weight(part) for part in parts]


@pytest.mark.parametrize("told", [6, 6.0, torch.tensor(6)])
def test_every_micro_batch_brings_its_own_number_of_items(told) -> None:
    batch = {"input_ids": torch.zeros(4, 4, dtype=torch.long), "labels": LABELS, ITEMS: told}
    parts = split(batch, micro_batches=2, replicas=2, weights=weigher(llama()))
    taken = [part for replica in parts for part in replica]
    assert [part.weight for part in taken] == [2, 1, 3, 0]
    assert [int(part.inputs[ITEMS]) for part in taken] == [2, 1, 3, 1], "a sum over nothing is divided by 1"
    assert all(part.inputs[ITEMS].shape == () for part in taken)


@pytest.mark.parametrize(
    "told, message",
    [
        (7, r"there are 6, but the batch says 7; say 6, leave it out, or give weight="),
        (True, "is one number for the global batch, but got True"),
        (torch.tensor([6, 6]), r"one number for the global batch, but got a tensor of shape \(2,\)"),
    ],
)
def test_a_number_of_items_that_is_not_the_labels_is_refused(told, message) -> None:
    batch = {"input_ids": torch.zeros(4, 4, dtype=torch.long), "labels": LABELS, ITEMS: told}
    with pytest.raises(BatchError, match=message):
        split(batch, micro_batches=2, replicas=1, weights=weigher(llama()))


# float32 sums in another order over two layers; measured 1e-7.
CLOSE = 1e-5


@on_ranks(2, timeout_s=60)
@pytest.mark.parametrize("layout", ["dp=2,micro_batches=2", "pp=2,micro_batches=4"])
@pytest.mark.parametrize("with_items", [True, False])
def test_a_llama_has_the_loss_and_the_gradients_of_the_whole_batch(rank: RankContext, layout, with_items) -> None:
    model = llama()
    ids = torch.arange(16).view(4, 4)
    batch: dict[str, object] = {"input_ids": ids, "labels": LABELS} | ({ITEMS: 6} if with_items else {})
    whole = objective(model, batch)
    whole.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    chosen = Layout.parse(layout)
    dealt = split(batch, micro_batches=chosen.num_micro_batches(4), replicas=chosen.dp, weights=weigher(model))
    program = assemble(model, dealt[0][0].inputs, layout=chosen, rank=rank.rank)
    result = program.step(dealt[program.place.replica], step=0)
    gradients = {name: parameter.grad for name, parameter in program.parameters.items()}
    program.close()
    assert result.weight == 6
    assert result.loss == pytest.approx(float(whole.detach()), rel=CLOSE)
    assert gradients
    for name, gradient in gradients.items():
        assert gradient is not None
        torch.testing.assert_close(gradient, wanted[name], rtol=CLOSE, atol=CLOSE * float(wanted[name].norm()))
