"""Names of the algorithms by which Open MPI sums, gathers and broadcasts without waiting, and how it is told of them.

Those of its component libnbc, by which operations that do not wait are done; coll_tuned, which has the same names and
some more, is told too, for whoever calls MPI's waiting operations beside us. Values of parameters; starts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from shardwise.errors import ConfigError

__all__ = ["ALGORITHMS", "AUTO", "open_mpi_parameters"]

AUTO = "auto"

# operation -> algorithm -> (number of libnbc, number of coll_tuned; 0: it has none)
ALGORITHMS: Mapping[str, Mapping[str, tuple[int, int]]] = MappingProxyType(
    {
        "allreduce": {"ring": (1, 4), "binomial": (2, 2), "rabenseifner": (3, 6), "recursive-doubling": (4, 3)},
        "allgather": {"linear": (1, 1), "recursive-doubling": (2, 3)},
        "bcast": {"linear": (1, 1), "binomial": (2, 6), "chain": (3, 2), "knomial": (4, 7)},
    }
)


def open_mpi_parameters(chosen: Mapping[str, str]) -> dict[str, str]:
    """MCA parameters for `chosen`, by operation; what is "auto" is left to Open MPI. Raises `ConfigError`."""
    told: dict[str, str] = {}
    for operation, name in chosen.items():
        known = ALGORITHMS[operation]
        if name == AUTO:
            continue
        if name not in known:
            raise ConfigError(
                f'Open MPI has {", ".join(known)} for mpi_{operation}, but got "{name}"; use one of these, or "auto"'
            )
        ours, waiting = known[name]
        told[f"coll_libnbc_i{operation}_algorithm"] = str(ours)
        if waiting:
            told["coll_tuned_use_dynamic_rules"] = "1"
            told[f"coll_tuned_{operation}_algorithm"] = str(waiting)
    return told
