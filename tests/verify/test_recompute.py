"""Units that are computed again on several ranks: equal to one device, with whatever else divides the model."""

from __future__ import annotations

import pytest
from models import make

from shardwise.errors import LayoutError
from shardwise.launch import RankStarter
from shardwise.verify import verify

TOLERANCE = 1e-5  # what float32 leaves of sums taken in another order


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("bert", "pp=2,schedule=zb-h1,recompute=full"),  # dropout; inputs' gradients first, weights' later
        ("llama", "pp=2,tp=2,recompute=selective"),  # sums over shards in place
        ("llama", "tp=2,sequence_parallel=on,recompute=full"),
        ("mixtral", "ep=2,recompute=full"),  # ranks have other tokens, and count each once
        ("resnet", "dp=2,recompute=full"),  # running statistics
        ("llama", "pp=2,schedule=zb-v,recompute=200KiB"),
    ],
)
def test_a_layout_that_computes_again_is_one_device(name: str, layout: str, starter: RankStarter) -> None:
    example = make(name)
    comparison = verify(
        example.model, example.batch, layout=layout, loss=example.loss, starter=starter, steps=3, timeout_s=100
    )
    assert comparison.equal, str(comparison)
    assert comparison.gradient_error <= TOLERANCE


def test_too_few_bytes_are_refused_with_the_bytes_that_are_needed(starter: RankStarter) -> None:
    example = make("llama")
    with pytest.raises(LayoutError, match="give it .* or more"):
        verify(example.model, example.batch, layout="pp=2,recompute=1KiB", loss=example.loss, starter=starter)
