"""Micro-batches of one update have the gradient of the whole batch: the exact global mean, on any axis.

Samples do not divide evenly, and have different numbers of labels: a mean of means would be another number.
"""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from shardwise.launch import RankStarter
from shardwise.verify import verify

pytestmark = pytest.mark.slow  # `make verify-all`


def tied_llama() -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=64, use_cache=False, tie_word_embeddings=True, **sizes))


def ragged(samples: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (samples, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for sample in range(samples):
        labels[sample, : sample % 7] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize(
    ("layout", "samples"),
    [
        ("micro_batches=3", 7),  # 3, 2 and 2 samples
        ("dp=2,micro_batches=3", 13),
        ("fsdp=2,zero=3,micro_batches=2", 7),
        ("cp=2,micro_batches=2", 3),
        ("pp=2,tp=2,micro_batches=3", 7),
    ],
)
def test_micro_batches_have_the_gradient_and_norm_of_the_batch(layout: str, samples: int, starter: RankStarter) -> None:
    comparison = verify(tied_llama(), ragged(samples), layout=layout, starter=starter, steps=2, timeout_s=100)
    assert comparison.equal, str(comparison)
    assert comparison.gradient_error <= 1e-5
    assert comparison.norm_error <= 1e-5  # by which all gradients are clipped
    assert comparison.micro_batch_error is not None
    assert comparison.micro_batch_error <= 1e-5
