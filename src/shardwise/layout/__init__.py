"""Layouts: how a model is spread over ranks, as a checked value. Knows no model, no mesh and no device."""

from __future__ import annotations

from shardwise.layout.layout import Layout, StageRule, Stages
from shardwise.layout.ranks import Coordinates, coordinates, experts, pipelines, rank_of, replicas, shards, stage_ranks
from shardwise.layout.unit_names import compress, expand

__all__ = [
    "Coordinates",
    "Layout",
    "StageRule",
    "Stages",
    "compress",
    "coordinates",
    "expand",
    "experts",
    "pipelines",
    "rank_of",
    "replicas",
    "shards",
    "stage_ranks",
]
