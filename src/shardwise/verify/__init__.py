"""Is the model under a layout the model on one device? Measured on real gradients, never assumed."""

from __future__ import annotations

from shardwise.verify.comparison import Comparison, TensorError
from shardwise.verify.verify import verify

__all__ = ["Comparison", "TensorError", "verify"]
