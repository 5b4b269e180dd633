"""Run files: what is written wrong is refused before anything starts, with the rule, the numbers and the repair."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwise.errors import ConfigError, LayoutError
from shardwise.layout import Layout
from shardwise.train.run_file import load_run, run_from

RUN = {"layout": "dp=2,pp=2", "model": {"factory": "a:b"}, "training": {"steps": 10, "global_batch": 8}}
EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_run_is_read_from_toml_and_its_folder_is_named_after_the_file(tmp_path) -> None:
    file = tmp_path / "small.toml"
    file.write_text(
        'layout = { dp = 2, stages = "depth" }\n[model]\nclass = "LlamaForCausalLM"\nconfig = "llama.json"\n'
        '[task]\nkind = "random_tokens"\nnum_train = 3\n'
        "[training]\nsteps = 5\nglobal_batch = 4\nbetas = [0.9, 0.99]\n[checkpoint]\nevery = 2\n"
    )
    run = load_run(file, ["training.steps=7", "training.learning_rate=1e-2"])
    assert run.folder == "runs/small"
    assert run.layout == Layout(dp=2, stages="depth")
    assert (run.model.class_name, run.model.config) == ("LlamaForCausalLM", "llama.json")
    assert run.task.options == {"num_train": 3}
    assert (run.training.steps, run.training.learning_rate, run.training.betas) == (7, 1e-2, (0.9, 0.99))
    assert run.checkpoint_folder == Path("runs/small/checkpoints")


def test_the_example_is_a_run() -> None:
    run = load_run(EXAMPLES / "demo.toml")
    assert run.layout.world_size == 4


@pytest.mark.parametrize(
    "override, told",
    [
        ("training.step=5", "training.step is no option; write steps"),
        ("trainning.steps=5", "trainning is no option; write training"),
        ("model.clas=x", "model.clas is no option; write class"),
        ("training.steps=0", "training.steps = 0: Input should be greater than or equal to 1"),
        ("training.steps=1.5", "training.steps = 1.5: Input should be a valid integer"),
        ("training.warm_up=11", "warm_up=11 and steps=10; use warm_up=1"),
        ("training.betas=[0.9, 1.0]", r"betas lie in \[0, 1\)"),
        ("model.config=x.json", "a factory or a config, but both are given; drop one"),
        ("model.factory=nocolon", "written \"module:function\", but got 'nocolon'"),
        ("training.steps.x=3", "sets a key of steps, but steps is 10"),
        ("training.steps", "write training.steps=100"),
        ("device=tpu", "device = 'tpu': Input should be 'cpu' or 'cuda'"),
    ],
)
def test_what_is_written_wrong_is_named_with_its_repair(override, told) -> None:
    with pytest.raises(ConfigError, match=told):
        run_from(RUN, [override])


def test_a_batch_with_fewer_samples_than_micro_batches_is_refused() -> None:
    with pytest.raises(LayoutError, match="7 samples are fewer than dp=2 × micro_batches=4 = 8"):
        run_from(RUN, ["training.global_batch=7", "layout=dp=2,pp=2,micro_batches=4"])


def test_without_training_a_run_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="training is missing; add it"):
        run_from({})


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match="nowhere.toml"):
        load_run(tmp_path / "nowhere.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("steps == 3")
    with pytest.raises(ConfigError, match=r"broken.toml is not.*line 1"):
        load_run(broken)


def test_the_seed_of_the_run_is_that_of_the_layout() -> None:
    assert run_from(RUN, ["training.seed=5"]).seeded_layout == Layout(dp=2, pp=2, seed=5)
