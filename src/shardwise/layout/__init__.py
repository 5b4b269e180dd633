"""Layouts: how a model is spread over ranks, as a checked value. Knows no model, no mesh and no device."""

from __future__ import annotations

from shardwise.layout.layout import SCHEDULE_FILES, SEARCHED, Context, Layout, Offload, StageRule, Stages, Unshard
from shardwise.layout.ranks import (
    Coordinates,
    contexts,
    coordinates,
    experts,
    pipelines,
    position_ranks,
    rank_of,
    replicas,
    shards,
    states,
)
from shardwise.layout.techniques import SYNCHRONISED, Communication, Precision, Techniques
from shardwise.layout.unit_names import compress, expand

__all__ = [
    "SCHEDULE_FILES",
    "SEARCHED",
    "SYNCHRONISED",
    "Communication",
    "Context",
    "Coordinates",
    "Layout",
    "Offload",
    "Precision",
    "StageRule",
    "Stages",
    "Techniques",
    "Unshard",
    "compress",
    "contexts",
    "coordinates",
    "expand",
    "experts",
    "pipelines",
    "position_ranks",
    "rank_of",
    "replicas",
    "shards",
    "states",
]
