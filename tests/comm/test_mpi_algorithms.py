"""Algorithms of Open MPI by name: the numbers that its parameters take, and a name that it has not got."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from shardwise.comm.mpi_algorithms import ALGORITHMS, open_mpi_parameters
from shardwise.errors import ConfigError


def test_what_is_auto_is_left_to_open_mpi() -> None:
    assert open_mpi_parameters({"allreduce": "auto", "allgather": "auto", "bcast": "auto"}) == {}


def test_a_name_becomes_the_numbers_of_both_components() -> None:
    assert open_mpi_parameters({"allreduce": "ring", "bcast": "auto"}) == {
        "coll_libnbc_iallreduce_algorithm": "1",
        "coll_tuned_use_dynamic_rules": "1",
        "coll_tuned_allreduce_algorithm": "4",
    }


def test_another_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match='has linear, recursive-doubling for mpi_allgather, but got "ring"'):
        open_mpi_parameters({"allgather": "ring"})


@pytest.mark.skipif(shutil.which("ompi_info") is None, reason="not installed: Open MPI (see docs/launching.md)")
def test_the_numbers_are_those_that_the_installed_open_mpi_tells() -> None:
    command = ["ompi_info", "--param", "coll", "libnbc", "--level", "9"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    for operation, known in ALGORITHMS.items():
        match = re.search(rf"Which i{operation} algorithm is used: (.*)", told)
        assert match is not None, operation
        numbers = dict(reversed(each.split()) for each in match[1].split(","))
        for name, (number, _) in known.items():
            assert numbers[name.replace("-", "_")] == str(number), (operation, name)
