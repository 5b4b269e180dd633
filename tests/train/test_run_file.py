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
        ("evaluate=3", "evaluate is no option; there are folder, layout, balance, device"),
        ("training.steps=0", "training.steps is at least 1, but got 0; use 1 or more"),
        ("training.steps=1.5", "training.steps is a whole number, but got 1.5; write it without"),
        ('training.steps="ten"', "training.steps is a whole number, but got 'ten'; write it without quotes"),
        ("training.learning_rate=-1", "training.learning_rate is more than 0, but got -1; use a number above 0"),
        ("training.learning_rate=nan", "training.learning_rate is a finite number, but got nan"),
        ("training.weight_decay=inf", "training.weight_decay is a finite number, but got inf"),
        ("training.final_fraction=2", "training.final_fraction is at most 1, but got 2; use 1 or less"),
        ("training.warm_up=11", "warm_up=11 and steps=10; use warm_up=1"),
        ("training.betas=[0.9, 1.0]", r"betas lie in \[0, 1\)"),
        ("training.betas=[0.9]", r"training.betas: they are two numbers, but got \[0.9\]; \[0.9, 0.95\] is usual"),
        ("training.optimizer=adam", "optimizer is one of adamw, sgd, momentum, muon, but got 'adam'; write \"adamw\""),
        ("training.schedule=step", "is one of cosine, constant, linear, wsd, inverse-sqrt, but got 'step'"),
        ("training.decay=11", "decay=11 and warm_up=0 of 10 steps; use decay=2"),
        ("training.accumulate=0", "training.accumulate is at least 1, but got 0"),
        ("training=5", r"training is a table, but got 5; write \[training\] and its keys below"),
        ("model.config=x.json", "a factory or a config, but both are given; drop one"),
        ("model.factory=nocolon", "written \"module:function\", but got 'nocolon'"),
        ("model.dtype=fp32", "model.dtype is one of float32, .*, but got 'fp32'"),
        ("training.steps.x=3", "sets a key of steps, but steps is 10"),
        ("training.steps", "write training.steps=100"),
        ("device=tpu", "device is one of cpu, cuda, but got 'tpu'"),
        ("folder=3", "folder is text, but got 3; write it in quotes"),
        ("balance=measure", 'balance is one of flops, measured, .*; write "measured"'),
        ("checkpoint.keep=0", "checkpoint.keep is at least 1, but got 0"),
        ("layout=4", 'layout: it is text or a table, but got 4; write "dp=2,pp=2"'),
    ],
)
def test_what_is_written_wrong_is_named_with_its_repair(override, told) -> None:
    with pytest.raises(ConfigError, match=told):
        run_from(RUN, [override])


@pytest.mark.parametrize(
    "layout, told",
    [
        ("dp=0", "an axis has 1 rank or more, but dp=0"),
        ("pp=two", "pp is a whole number, but got 'two'"),
        ("zp=2", "a layout has dp, .*, but got zp"),
        ("pp=2,pp=3", "written name=value once each"),
        ("pp=2,micro_batches=-1", "a step has 1 micro-batch or more, but micro_batches=-1"),
        ("pp=2,schedule=zb", 'but got "zb"'),
        ("pp=2,schedule=zb-v,chunks=3", "zb-v is made for 2 stages a rank, but chunks=3; write chunks=2"),
        ("pp=2,schedule=nowhere.json", "a schedule file is a file that can be read, but nowhere.json: No such file"),
        ("pp=2,schedule=pipedream-2bw,micro_batches=1", "there are 1 for 2 stages"),
        ("pp=2,stages=weight", "stages are balanced by cost, parameters, depth or listed by hand"),
        ("pp=2,stages=[a|b|c]", "there are 3 and pp=2; write pp=3 or list 2 stages"),
        ('{dp="2"}', "but dp='2'"),
        ('{pp=2, stages=[["a"], [3]]}', "lists of unit names, one for each stage"),
    ],
)
def test_a_wrong_layout_is_named_with_its_repair(layout, told) -> None:
    with pytest.raises(LayoutError, match=told):
        run_from(RUN, [f"layout={layout}"])


def test_one_axis_of_a_layout_written_as_text_is_overridden() -> None:
    assert run_from(RUN, ["layout.dp=1", "layout.micro_batches=3"]).layout == Layout(dp=1, pp=2, micro_batches=3)


def test_every_fault_of_a_run_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)device is one of cpu.*training.steps is at least 1"):
        run_from(RUN, ["training.steps=0", "device=tpu"])


def test_stages_are_balanced_in_one_way() -> None:
    assert run_from(RUN, ["balance=depth"]).seeded_layout == Layout(dp=2, pp=2, stages="depth")
    assert run_from(RUN, ["balance=parameters"]).seeded_layout == Layout(dp=2, pp=2, stages="parameters")
    assert run_from(RUN, ["balance=measured"]).seeded_layout == Layout(dp=2, pp=2)
    with pytest.raises(ConfigError, match=r'balance = "measured" and the layout is .*; drop balance, or stages'):
        run_from(RUN, ["balance=measured", "layout=pp=2,stages=[a|b]"])


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


@pytest.mark.parametrize(
    "more, told",
    [
        ({"asynchronous": {"method": "local-sgd", "every": 2}}, "need not wait for each other, but shares=3:1; drop"),
        ({"model": {"factory": "a:b", "batch_norm": "synchronised"}}, "have as many micro-batches, but shares=3:1"),
    ],
)
def test_shares_are_for_replicas_that_meet_once_a_step(more: dict[str, object], told: str) -> None:
    run = RUN | {"layout": "dp=2,shares=3:1"}
    assert run_from(run).most_micro_batches == 3
    with pytest.raises(ConfigError, match=told):
        run_from(run | more)


def test_accumulate_is_the_layouts_number_of_micro_batches() -> None:
    assert run_from(RUN, ["training.accumulate=2", "layout=dp=2"]).layout == Layout(dp=2, micro_batches=2)
    assert run_from(RUN, ["training.accumulate=2", "layout=dp=2,micro_batches=2"]).num_micro_batches == 2
    with pytest.raises(ConfigError, match="accumulate = 2 and micro_batches = 4; write one of the two"):
        run_from(RUN, ["training.accumulate=2", "layout=dp=2,micro_batches=4"])
