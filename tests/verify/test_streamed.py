"""A model streamed unit by unit on one device has the loss, gradients and updates of the whole model."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from models import Example, make
from safetensors.torch import save_file

from shardwise.errors import ConfigError
from shardwise.launch import RankPool, RankStarter
from shardwise.layout import Layout
from shardwise.verify import Comparison, verify
from shardwise.verify.comparison import errors_of
from shardwise.verify.sides import Job, Side, run_side, run_streamed_side
from streamed_models import Deep, KnowsTheRanks

pytestmark = pytest.mark.slow  # `make verify-all`

TOLERANCE = 1e-6  # both sum the same numbers; the later stage's part of a shared gradient may be added first
MICRO_BATCHES = 4


def job_of(example: Example, optimizer: str = "sgd") -> Job:
    return Job(
        model=example.model,
        batch=example.batch,
        loss=example.loss,
        layout=Layout(),
        micro_batches=MICRO_BATCHES,
        steps=1,
        optimizer=optimizer,
        learning_rate=0.05,
        dtype=None,
        batch_dims={},
        units=(),
        weight=None,
    )


def worst(streamed: Side, whole: Side, *, by_sign: bool = False) -> float:
    assert set(streamed.gradients) == {name for name, gradient in whole.gradients.items() if gradient is not None}
    errors = errors_of(
        streamed.gradients,
        streamed.updates,
        whole.gradients,
        whole.updates,
        by_sign=by_sign,
        roundings=whole.roundings,
    )
    return max(max(error.gradient, error.update) for error in errors)


# t5: what the encoder made is read by every decoder layer; tied: one table at both ends; albert: one layer called 12
# times; bart: layers are dropped, by micro-batch; resnet: BatchNorm's statistics; mixtral: losses of routers
@pytest.mark.parametrize("name", ["llama", "t5", "tied", "mixtral", "unet", "bert", "bart", "albert", "resnet"])
def test_streamed_is_whole_with_dropout_on(name: str, one: RankPool, tmp_path: Path) -> None:
    job = job_of(make(name))
    whole = one.run(run_side, job, Layout(), MICRO_BATCHES, False, timeout_s=60)[0]
    streamed = one.run(run_streamed_side, job, MICRO_BATCHES, 1, tmp_path / "files", timeout_s=60)[0]
    assert streamed.num_stages >= 5
    assert streamed.losses == pytest.approx(whole.losses, rel=TOLERANCE)
    assert streamed.norm == pytest.approx(whole.norm, rel=TOLERANCE)
    assert worst(streamed, whole) <= TOLERANCE


def test_streamed_has_the_update_of_adamw(one: RankPool, tmp_path: Path) -> None:
    job = job_of(make("tied"), optimizer="adamw")
    whole = one.run(run_side, job, Layout(), MICRO_BATCHES, False, timeout_s=60)[0]
    streamed = one.run(run_streamed_side, job, MICRO_BATCHES, 1, tmp_path / "files", timeout_s=60)[0]
    assert worst(streamed, whole, by_sign=True) <= TOLERANCE


@pytest.mark.parametrize("name, layout, dtype", [("llama", "dp=2", None), ("t5", "pp=2", "float64")])
def test_a_layout_is_held_against_the_streamed_model(
    name: str, layout: str, dtype: str | None, starter: RankStarter
) -> None:
    example = make(name)
    before = {key: value.clone() for key, value in example.model.state_dict().items()}
    comparison = verify(
        example.model, example.batch, layout=layout, dtype=dtype, reference="streamed", starter=starter, timeout_s=60
    )
    assert comparison.equal, str(comparison)
    assert "streamed unit by unit" in comparison.reference
    assert comparison.reference in str(comparison)
    assert comparison.micro_batch_error is None
    assert "streamed" in comparison.exempt
    assert all(torch.equal(value, before[key]) for key, value in example.model.state_dict().items())


# -- which reference --------------------------------------------------------------------------------------------------

small = functools.partial(Deep, width=8, depth=6)
BATCH = (torch.linspace(-1, 1, 64).view(8, 8),)
WHOLE_BYTES = 4 * 6 * (8 * 8 + 3 * 8) * 4  # weights, gradients and two copies, in float32


@pytest.mark.parametrize("make_model", [small, small()])
def test_auto_streams_what_does_not_fit(make_model: Callable[[], Deep] | Deep, starter: RankStarter) -> None:
    def verified(memory_bytes: int) -> Comparison:
        return verify(make_model, BATCH, layout="pp=2", memory_bytes=memory_bytes, starter=starter, timeout_s=60)

    fits, does_not = verified(WHOLE_BYTES), verified(WHOLE_BYTES - 1)
    assert fits.equal
    assert does_not.equal
    assert fits.reference == "the whole model on one device"
    assert fits.micro_batch_error is not None
    assert does_not.reference == (
        "the model streamed unit by unit on one device (6 stages): 8.25 KiB of weights, gradients and copies would not "
        "fit 8.25 KiB free"
    )


def test_a_streamed_model_takes_one_step(starter: RankStarter) -> None:
    with pytest.raises(ConfigError, match="takes one step, but steps=3"):
        verify(small, BATCH, layout="pp=2", steps=3, reference="streamed", starter=starter)


def test_a_reference_has_a_name(starter: RankStarter) -> None:
    with pytest.raises(ConfigError, match="is not one of auto, whole, streamed"):
        verify(small, BATCH, layout="pp=2", reference="half", starter=starter)


# -- differences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backward_only, told",
    [
        (False, r"the output of unit layers\.2 \(call 0, micro-batch 0\) diverges first"),
        (True, r"outputs are equal; backward, unit layers\.2 diverges first, at the gradient of layers\.2"),
    ],
)
def test_a_broken_layer_is_found_and_named(backward_only: bool, told: str, starter: RankStarter) -> None:
    broken = functools.partial(KnowsTheRanks, broken=2, backward_only=backward_only)
    comparison = verify(broken, BATCH, layout="pp=2", reference="streamed", starter=starter, timeout_s=60)
    assert not comparison.equal
    assert comparison.first_difference is not None
    assert re.search(told, comparison.first_difference), comparison.first_difference


# -- values from files, and ranks from one starter --------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["whole", "streamed"])
def test_values_come_from_a_folder_of_safetensors(reference: str, starter: RankStarter, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        saved = small()
    save_file(saved.state_dict(), tmp_path / "model.safetensors")
    comparison = verify(
        small, BATCH, layout="pp=2", checkpoint=tmp_path, reference=reference, starter=starter, timeout_s=60
    )
    assert comparison.equal, str(comparison)
    assert comparison.loss == pytest.approx(float(saved(*BATCH).detach()), rel=TOLERANCE)


def test_a_starter_of_the_callers_is_used_and_left_open(starter: RankStarter) -> None:
    starters = {child.pid for child in psutil.Process().children()}
    assert verify(small, BATCH, layout="dp=2", starter=starter, timeout_s=60).equal
    assert starter.alive
    assert {child.pid for child in psutil.Process().children()} == starters
