"""`verify` from a script: no main guard, classes of the script itself, and a backward that the caller has run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # `make verify-all`

SCRIPT = """
import pytest
import torch, torch.nn as nn
import shardwise as sw

class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.last = None

    def forward(self, x):
        self.last = torch.tanh(self.linear(x))  # a cached tensor with a graph behind it
        return x + self.last

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer(6) for _ in range(4))

    def forward(self, x, y):
        for layer in self.layers:
            x = layer(x)
        return {"loss": (x - y).square().mean(), "kept": self.layers[-1].last}

torch.manual_seed(0)
model, batch = Model(), {"x": torch.randn(8, 6), "y": torch.randn(8, 6)}
model(**batch)["loss"].backward()
before = model.layers[0].linear.weight.grad.clone()
comparison = sw.verify(model, batch, layout="pp=2", steps=2)
assert comparison.equal, str(comparison)
assert torch.equal(model.layers[0].linear.weight.grad, before)
assert model.layers[0].last is not None
factory = sw.verify(Model, batch, layout="dp=2,pp=2")
assert factory.equal, str(factory)
print("proven", comparison.gradient_error <= 1e-5, factory.gradient_error <= 1e-5)
"""


def test_a_script_without_a_main_guard_is_verified(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=100, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["proven True True"]
