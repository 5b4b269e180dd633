"""What joins the hosts of a source, where that is known and is not what the catalogue has for its GPU.

Published facts of a source's machine, with where they stand; nothing here is fitted. Refuses to know rows.
"""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from shardwise.describe.cluster import Link

__all__ = ["Fabric", "fabric_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fabric:
    """bytes_per_s: of one device, its share of the host's adapters, promised; None: the catalogue's. efficiency: the
    share that large messages reach, None: the catalogue's. trees: whether sums go up trees. crowded_s: what a hop
    inside a host takes longer while messages of pipelines cross hosts."""

    name: str
    bytes_per_s: float | None = None
    efficiency: float | None = None
    trees: bool = True
    crowded_s: float = 0.0

    def link(self, between: Link) -> Link:
        """The link between hosts that it makes of the catalogue's."""
        return dataclasses.replace(
            between,
            name=self.name,
            bytes_per_s=self.bytes_per_s or between.bytes_per_s,
            efficiency=self.efficiency or between.efficiency,
            trees=self.trees,
        )


_FABRICS = MappingProxyType(
    {
        # Jean Zay: four Omni-Path 100 adapters for the eight devices of a host
        "bloom_176b_prequel_layouts.csv": Fabric(name="Omni-Path 100", bytes_per_s=6.25e9),
        # the source's own benchmark of its cluster: an all-gather of two hosts reaches 185 of 400 GB/s a host (median),
        # and up to 64 ranks all-reduces become slower as rings of so many turns do, not as trees
        "hf_ultrascale_playbook_benchmarks.csv": Fabric(
            name="Elastic Fabric Adapter", efficiency=0.46, trees=False, crowded_s=2e-4
        ),
    }
)


def fabric_of(file: str) -> Fabric | None:
    """Of the source whose file is called so; None where the catalogue's link stands for it."""
    return _FABRICS.get(file)
