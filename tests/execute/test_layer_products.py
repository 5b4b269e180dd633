"""Gradients of stacked weights are summed where they are, whatever the layout of the stack and however few the rows."""

from __future__ import annotations

import pytest
import torch

from shardwise.execute.layer_products import Grouped

GROUPS, WIDTH, OUT = 4, 8, 12
ENDS = (3, 3, 7, 9)  # the second group has no rows, and two rows behind the last belong to none
ROWS = 11


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_are_added_to_the_gradient_that_is_there(transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(ROWS, width, generator=generator) for width in (WIDTH, OUT))
    shape = (GROUPS, OUT, WIDTH) if transposed else (GROUPS, WIDTH, OUT)
    stored = torch.randn(shape, generator=generator)
    before = stored.clone()
    into = stored.transpose(1, 2) if transposed else stored
    Grouped(torch.tensor(ENDS, dtype=torch.int32)).add_weight_gradient(into, dy, x, into)
    wanted = (before.transpose(1, 2) if transposed else before).double()
    for group, (start, stop) in enumerate(zip((0, *ENDS), ENDS, strict=False)):
        wanted[group] += x[start:stop].double().T @ dy[start:stop].double()
    torch.testing.assert_close(into.double(), wanted, rtol=1e-5, atol=1e-5)  # float32 sums of at most four rows
