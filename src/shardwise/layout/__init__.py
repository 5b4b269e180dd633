"""Layouts: how a model is spread over ranks, as a checked value. Knows no model, no mesh and no device."""

from __future__ import annotations

from shardwise.layout.layout import SCHEDULE_FILES, SEARCHED, Layout, StageRule, Stages
from shardwise.layout.ranks import (
    Coordinates,
    coordinates,
    experts,
    pipelines,
    position_ranks,
    rank_of,
    replicas,
    shards,
)
from shardwise.layout.unit_names import compress, expand

__all__ = [
    "SCHEDULE_FILES",
    "SEARCHED",
    "Coordinates",
    "Layout",
    "StageRule",
    "Stages",
    "compress",
    "coordinates",
    "expand",
    "experts",
    "pipelines",
    "position_ranks",
    "rank_of",
    "replicas",
    "shards",
]
