"""The example of a policy at tiny size, through the launcher that its command uses, and equal to one device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from examples.run import Example, main
from examples.vla.pi0 import Pi0Policy
from examples.vla.policy import Policy
from shardwise.launch import RankStarter
from shardwise.verify import verify

pytest.importorskip("minigrid")

TOWERS = "stages=[vision|language+fusion+memory]"
SIZES = {"num_actions": 3, "vocabulary_size": 9, "num_words": 5, "num_steps": 4, "image_size": 8, "width": 16}


def policy() -> Policy:
    return Policy(**SIZES, heads=2)


def batch(size: int = 8) -> dict[str, torch.Tensor]:
    """Windows of different lengths, instructions too."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 9, (size, 5), generator=generator)
    words[torch.arange(5) > torch.arange(size)[:, None] % 5] = 0
    actions = torch.randint(3, (size, 4), generator=generator)
    actions[torch.arange(4) > torch.arange(size)[:, None] % 4] = -100
    return {
        "images": torch.randint(256, (size, 4, 3, 8, 8), generator=generator, dtype=torch.uint8),
        "instruction": words,
        "previous": torch.randint(4, (size, 4), generator=generator),
        "target_actions": actions,
    }


def loss(outputs: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs.flatten(0, 1), inputs["target_actions"].flatten())


def weight(inputs: dict[str, torch.Tensor]) -> float:
    return float((inputs["target_actions"] != -100).sum())


@pytest.mark.parametrize(
    "layout",
    [
        f"pp=2,micro_batches=4,{TOWERS}",
        "dp=2,micro_batches=2",
        pytest.param(f"dp=2,pp=2,{TOWERS}", marks=pytest.mark.slow),
    ],
)
def test_a_policy_of_two_towers_is_one_device(layout: str, starter: RankStarter) -> None:
    comparison = verify(policy, batch(), layout=layout, loss=loss, weight=weight, steps=2, starter=starter)
    assert comparison.equal, str(comparison)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pp=2,micro_batches=4", "dp=2,pp=2", "tp=2,micro_batches=2"])
def test_pi0_is_one_device_with_the_noise_that_it_draws(layout: str, starter: RankStarter) -> None:
    sizes = {name: value for name, value in SIZES.items() if name not in ("num_words", "num_steps")}
    comparison = verify(lambda: Pi0Policy(**sizes, heads=2), batch(), layout=layout, weight=weight, starter=starter)
    assert comparison.equal, str(comparison)


def test_a_step_is_answered_from_itself_and_those_before_it() -> None:
    torch.manual_seed(0)
    made, inputs = policy().eval(), {name: value for name, value in batch().items() if name != "target_actions"}
    later = {name: value.clone() for name, value in inputs.items()}
    later["images"][:, 3] = 255 - later["images"][:, 3]
    later["previous"][:, 3] = (later["previous"][:, 3] + 1) % 4
    with torch.no_grad():
        answers, others = made(**inputs), made(**later)
    assert torch.equal(answers[:, :3], others[:, :3])
    assert not torch.equal(answers[:, 3], others[:, 3])


def test_a_policy_reads_its_words_and_not_the_empty_places_behind_them() -> None:
    torch.manual_seed(0)
    made, inputs = policy().eval(), {name: value[:1] for name, value in batch().items() if name != "target_actions"}
    with torch.no_grad():
        made.language.words.weight[0] += 1  # what fills
        answers = made(**inputs)
        made.language.words.weight[0] -= 1
        assert torch.allclose(made(**inputs), answers, atol=1e-6)
        inputs["instruction"][:, 0] = inputs["instruction"][:, 0] % 8 + 1
        assert not torch.allclose(made(**inputs), answers, atol=1e-3)


@pytest.mark.parametrize("run", ["run", pytest.param("pi0", marks=pytest.mark.slow)])
def test_vla_is_recorded_learnt_and_played_on_two_towers(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {
        "folder": json.dumps(str(tmp_path / "run")),
        "task.episodes": 12,
        "task.held_out_episodes": 3,
        "task.play_episodes": 2,
        "task.film": json.dumps(str(tmp_path / "film.gif")),
        "training.steps": 3,
        "training.global_batch": 8,
        "training.warm_up": 1,
        "training.evaluate_every": 3,
        "model.options.width": 16,
        "model.options.heads": 2,
    }
    told = main(
        ["vla", "--run", run, *(part for name, value in values.items() for part in ("--set", f"{name}={value}"))]
    )
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == told
    assert told["example"] == "vla"
    assert 0 <= float(str(told["success"])) <= 1
    assert (tmp_path / "film.gif").stat().st_size > 0


def test_the_page_tells_its_figure() -> None:
    page = Path("examples/vla/README.md").read_text(encoding="utf-8")
    assert Example.read("vla").figure in page
    assert all((Path("examples/vla") / f"{run}.toml").is_file() and run in page for run in ("run", "local"))
