"""The traced model that `shardwise plan --cluster` searches: the same that `shardwise train` does, of its module."""

from __future__ import annotations

from shardwise.train.traced_model import Traced, job_of, traced_model

__all__ = ["Traced", "job_of", "traced_model"]
