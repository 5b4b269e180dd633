"""`shardwise probe` prints what it measured and writes a cluster that can be loaded; measuring is tested elsewhere."""

from __future__ import annotations

import json

import pytest

from shardwise.cli import probe as verb
from shardwise.cli import run_command
from shardwise.describe.catalogue import load_cluster
from shardwise.describe.kernels import Exchange, ExchangeKind, Kernel, KernelKind, Phase
from shardwise.describe.measured import TINY, DividedTime, ExchangeTime, KernelTime, MachineTimes, ProgramTime


def machine(ranks: int) -> MachineTimes:
    """A made-up one."""
    product = Kernel(
        kind=KernelKind.MATMUL,
        phase=Phase.FORWARD,
        dtype="float32",
        flops=2 * 512**3,
        nbytes=3 * 4 * 512**2,
        shape=(1, 512, 512, 512),
    )
    stream = Kernel(kind=KernelKind.MEMORY, phase=Phase.FORWARD, dtype="float32", nbytes=1 << 26)
    tiny = Kernel(kind=KernelKind.MEMORY, phase=Phase.FORWARD, dtype="float32", nbytes=128)
    seconds = (4e-3, 4.4e-3)
    kernels = (
        KernelTime(kernel=tiny, seconds=(2e-5, 2.2e-5), what=TINY),
        KernelTime(kernel=product, seconds=seconds),
        KernelTime(kernel=stream, seconds=seconds, what="sum of two tensors"),
    )
    exchange = ExchangeTime(
        kind=ExchangeKind.ALL_REDUCE, group=ranks, nbytes=1 << 20, way="shared memory", seconds=(1e-3, 1.2e-3)
    )
    summed = Exchange(kind=ExchangeKind.ALL_REDUCE, axis="tp", phase=Phase.FORWARD, nbytes=1 << 20)
    program = ProgramTime(
        action_s=(3e-4, 3e-4), step_s=(1e-3, 2e-3), start_s=2.5, layout_s=0.5, framework_bytes=200 << 20
    )
    return MachineTimes(
        ranks=ranks,
        cores=2,
        device="a core",
        memory_bytes=4 << 30,
        kernels=kernels,
        alone=kernels,
        exchanges=(exchange,),
        program=program,
        divided=(
            DividedTime(what="dp=2", group=1, kernels=(product,), exchanges=(), seconds=seconds),
            DividedTime(what="tp=2", group=2, kernels=(product,), exchanges=(summed,), seconds=(6e-3, 6.6e-3)),
        ),
    )


@pytest.fixture
def asked(monkeypatch) -> list[tuple[object, ...]]:
    """What the verb has asked to measure; nothing is started."""
    wanted: list[tuple[object, ...]] = []

    def measured(ranks, *, device, how, preload, tell):
        wanted.append((tuple(ranks), device, *preload))
        return tuple(machine(count) for count in ranks)

    monkeypatch.setattr(verb, "probe", measured)
    return wanted


def test_it_prints_what_was_measured_and_how_well_it_fits(asked, capsys) -> None:
    assert run_command(["probe", "--ranks", "2,4"]) == 0
    assert asked == [((2, 4), "cpu")]
    told = capsys.readouterr().out
    assert "=== 2 ranks at once\n" in told
    assert "=== 4 ranks at once on 2 cores\n" in told
    assert "matmul float32 512x512x512 forward" in told
    assert "all-reduce of 4, shared memory" in told
    assert "formula beside measurement" in told
    (way,) = (line for line in told.split("=== 4")[0].splitlines() if line.startswith("micro-batch of a model, tp=2"))
    assert "6.3 ms" in way
    assert "interrupted_s" in told
    packs = next(line for line in told.splitlines() if line.startswith("pack_bytes_per_s"))
    assert "B/s" in packs.split("to")[0]  # and not so many seconds
    assert "10.0%" in told or "9.5%" in told  # the spread of two rounds


def test_what_runs_import_is_imported_by_the_ranks_that_are_measured(asked, capsys) -> None:
    assert run_command(["probe", "--ranks", "2", "--import", "transformers,numpy"]) == 0
    assert asked == [((2,), "cpu", "transformers", "numpy")]


def test_the_file_holds_a_cluster_for_each_number_of_ranks(asked, tmp_path, capsys) -> None:
    file = tmp_path / "cluster.toml"
    assert run_command(["probe", "--ranks", "2,4", "--out", str(file)]) == 0
    assert f"written to {file}" in capsys.readouterr().out
    assert load_cluster(str(file)).num_devices == 2
    assert load_cluster(f"{file}@4").num_devices == 4
    assert run_command(["probe", "--ranks", "3", "--out", str(file)]) == 0
    assert load_cluster(str(file)).num_devices == 3


def test_json_has_the_numbers_and_nothing_else_is_printed(asked, tmp_path, capsys) -> None:
    assert run_command(["probe", "--ranks", "2", "--json", "--out", str(tmp_path / "c.toml")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["measured"][0]["ranks"] == 2
    assert told["fitted"][0]["cluster"]["hosts"][0]["devices"] == 2
    assert {each["name"] for each in told["fitted"][0]["coefficients"]} >= {"matmul", "latency_s", "action_s"}


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--ranks", "two"], "such as 2,4, but got 'two'"),
        (["--ranks", "2,0"], "such as 2,4, but got '2,0'"),
        (["--out", "/nowhere/at/all/c.toml"], "make /nowhere/at/all"),
    ],
)
def test_a_wrong_command_line_is_one_line(asked, capsys, arguments, told) -> None:
    assert run_command(["probe", *arguments]) == 1
    assert told in capsys.readouterr().err
    assert asked == []
