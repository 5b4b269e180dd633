"""A profile adds up what its parts say, and reads back what it writes."""

from __future__ import annotations

import dataclasses
import json

import pytest

from hand_profiles import chain
from shardwise.describe.profile import ModelProfile, ParameterProfile, UnitProfile, bytes_per_element
from shardwise.errors import ModelError


@pytest.mark.parametrize(
    "dtype, nbytes", [("float32", 4), ("bfloat16", 2), ("float8_e4m3fn", 1), ("int64", 8), ("bool", 1)]
)
def test_a_dtype_tells_its_size(dtype, nbytes) -> None:
    assert bytes_per_element(dtype) == nbytes


@pytest.mark.parametrize("dtype", ["floaty", "int4", "torch.float32"])
def test_a_dtype_without_a_size_is_refused(dtype) -> None:
    with pytest.raises(ModelError, match="named as in torch"):
        bytes_per_element(dtype)


def test_totals_are_those_of_the_parts() -> None:
    profile = chain([10, 20, 30], elements=[4, 5, 6], glue_saved=7)
    assert profile.num_parameters == 15
    assert profile.parameter_bytes == 60
    assert profile.forward_flops == 60
    assert profile.backward_flops == 120
    assert profile.saved_bytes == 307


def test_a_tied_parameter_counts_once_in_the_model_and_in_each_of_its_units() -> None:
    weight = {"embed.weight": ParameterProfile(shape=(10, 4), dtype="float32")}
    profile = dataclasses.replace(
        chain([1, 1], units=["embed", "head"]),
        units=tuple(UnitProfile(name=name, class_name="L", parameters=weight) for name in ("embed", "head")),
    )
    assert profile.num_parameters == 40
    assert [unit.num_parameters for unit in profile.units] == [40, 40]


def test_parameters_that_nothing_reads_are_named() -> None:
    spare = {"spare": ParameterProfile(shape=(3,), dtype="float32")}
    profile = dataclasses.replace(chain([1, 1]), glue_parameters=spare)
    assert profile.unread == ("spare",)
    assert profile.num_parameters == 11


def test_json_reads_back_as_written() -> None:
    profile = dataclasses.replace(chain([10, 20], glue_saved=5), tied={"a": ("b", "c")}, buffer_bytes=12)
    assert ModelProfile.from_json(profile.to_json()) == profile


def test_a_large_model_goes_to_json_and_back() -> None:
    profile = chain([1] * 2000)
    assert ModelProfile.from_json(profile.to_json()) == profile


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"units": 3}'])
def test_json_that_is_no_profile_is_refused(text) -> None:
    with pytest.raises(ModelError, match="compare with the output"):
        ModelProfile.from_json(text)


def test_a_value_of_a_node_that_is_not_there_is_refused() -> None:
    told = json.loads(chain([1, 1]).to_json())
    told["flow"]["values"][0]["node"] = 99
    with pytest.raises(ModelError, match=r"a value is made by one of the nodes, of .*, but it is number 99"):
        ModelProfile.from_json(json.dumps(told))


def test_calls_that_are_not_those_of_the_dataflow_are_refused() -> None:
    profile = chain([1, 2, 3])
    with pytest.raises(ModelError, match="2 entries, 3 calls"):
        dataclasses.replace(profile, calls=profile.calls[:2])


def test_a_call_of_no_unit_is_refused() -> None:
    profile = chain([1, 2])
    with pytest.raises(ModelError, match=r"\['layers.1'\] are none"):
        dataclasses.replace(profile, units=profile.units[:1])


def test_negative_costs_are_refused() -> None:
    with pytest.raises(ModelError, match=r"layers.0#0 costs is 0 or more, but got -1"):
        dataclasses.replace(chain([1]).calls[0], forward_flops=-1)
