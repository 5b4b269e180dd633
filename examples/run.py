"""Runs one example and ends with a line of JSON: `{"example": "ner", "f1": 0.71, "equal": true}`.

    python examples/run.py ner --data FOLDER            what `make example NAME=ner DATA=FOLDER` calls
    python examples/run.py ner --launcher mpirun        mpirun -np 4 shardwise train examples/ner/run.toml
    python examples/run.py images --run vit             another run file of the folder
    python examples/run.py ner --set training.steps=20  any value of the run file

An example is a folder with `run.toml`, `README.md` and `example.toml`:

    figure     which figure of the last evaluation is told
    more       which others are told behind it
    data       where its data are, if nobody says so: a folder, or several folders, files and globs; nothing where it
               needs none
    get        how to get them
    packages   of PyPI, installed without their dependencies if missing
    commands   in place of a run file: of Python, one after another; the last ends with the line of JSON

`equal` says whether `shardwise verify` found the layout equal to one device at the first step; null: not asked for.
"""

from __future__ import annotations

import argparse
import glob
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwise.errors import ConfigError, ShardwiseError
from shardwise.events import read_events
from shardwise.train.run import train
from shardwise.train.run_file import load_run

EXAMPLES = Path(__file__).parent
LAUNCHERS = ("local", "torchrun", "mpirun")


@dataclass(frozen=True, kw_only=True)
class Example:
    """What example.toml says."""

    name: str
    figure: str
    more: tuple[str, ...] = ()
    data: str | tuple[str, ...] = ()
    get: str = ""
    packages: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()

    @classmethod
    def read(cls, name: str) -> Example:
        """The example of a folder. Raises ConfigError for an unknown one."""
        file = EXAMPLES / name / "example.toml"
        if not file.is_file():
            known = sorted(each.parent.name for each in EXAMPLES.glob("*/example.toml"))
            raise ConfigError(f"an example is one of {', '.join(known)}, but got {name!r}; correct NAME")
        told: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
        lists = {field: tuple(value) for field, value in told.items() if isinstance(value, list)}
        return cls(name=name, **told | lists)

    def overrides(self, data: Sequence[str]) -> list[str]:
        """Where its data are. Raises ConfigError with how to get them."""
        own = (self.data,) if isinstance(self.data, str) else self.data
        chosen = [str(Path(each).expanduser()) for each in data or own]
        if not chosen:
            return []
        if isinstance(self.data, str) and not (len(chosen) == 1 and Path(chosen[0]).is_dir()):
            raise ConfigError(
                f"the example {self.name} reads data from {', '.join(chosen)}, which is no folder; {self.get}"
            )
        missing = [each for each in chosen if not glob.glob(each, recursive=True)]
        if missing:
            raise ConfigError(f"the example {self.name} reads data from {missing[0]}, which is not there; {self.get}")
        return [f"task.data={json.dumps(chosen if len(chosen) > 1 else chosen[0])}"]

    def install(self) -> None:
        """Its packages, where they are missing."""
        for package in self.packages:
            try:
                importlib.metadata.distribution(package)
            except importlib.metadata.PackageNotFoundError:
                print(f"installing {package}", flush=True)
                subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", package], check=True)


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    """Runs the example that the command line names; prints and returns what it reached."""
    asked = _parser().parse_args(arguments)
    example = Example.read(asked.name)
    if example.commands:
        return _commanded(example)
    file = EXAMPLES / asked.name / f"{asked.run}.toml"
    overrides = [*example.overrides(asked.data), *asked.set]
    if not any(each.startswith("model.path=") for each in asked.set):
        example.install()
    run = load_run(file, overrides)
    _train(file, overrides, asked.launcher, run.layout.world_size)
    equal = _verified(file, overrides) if asked.verify else None
    found = last_figures(run.events_folder)
    figures = {name: round(found[name], 4) for name in (example.figure, *example.more)}
    told = {"example": asked.name, **figures, "equal": equal}
    print(json.dumps(told), flush=True)
    return told


def _commanded(example: Example) -> dict[str, object]:
    """Runs its commands, of which the last prints a line of JSON."""
    printed = ""
    for command in example.commands:
        done = subprocess.run([sys.executable, *shlex.split(command)], check=True, stdout=subprocess.PIPE, text=True)
        print(done.stdout, end="", flush=True)
        printed = done.stdout
    told = {"example": example.name, **json.loads(printed.strip().splitlines()[-1])}
    print(json.dumps(told), flush=True)
    return told


def last_figures(events: Path) -> dict[str, float]:
    """The figures of the last evaluation. Raises ConfigError where there was none."""
    figures = [
        event.data.get("figures") for event in read_events(events) if event.kind == "evaluation" and not event.rank
    ]
    found = figures[-1] if figures else None
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"{events} tells of no evaluation with figures; set training.evaluate_every")
    return {str(name): float(value) for name, value in found.items()}


def _train(file: Path, overrides: Sequence[str], launcher: str, ranks: int) -> None:
    if launcher == "local":
        train(file, overrides=overrides, overwrite=True)
        return
    told = ["train", str(file), "--overwrite", *(part for each in overrides for part in ("--set", each))]
    command = [sys.executable, "-m", "shardwise", *told]
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "-m", "shardwise", *told]
    if launcher == "mpirun":
        command = ["mpirun", "-np", str(ranks), "--oversubscribe", *command]
    environment = dict(os.environ)
    if launcher == "mpirun" and os.geteuid() == 0:  # Open MPI refuses root unless told twice
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    subprocess.run(command, check=True, env=environment)


def _verified(file: Path, overrides: Sequence[str]) -> bool:
    told = [part for each in overrides for part in ("--set", each)]
    return subprocess.run([sys.executable, "-m", "shardwise", "verify", str(file), *told], check=False).returncode == 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a folder of examples/")
    parser.add_argument("--run", default="run", help="which run file of the folder, without .toml")
    parser.add_argument("--data", nargs="+", action="extend", default=[], help="where the example's data are")
    parser.add_argument("--launcher", default="local", choices=LAUNCHERS)
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="a value of the run file")
    parser.add_argument("--verify", action="store_true", help="compare the layout with one device before all else")
    return parser


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())  # as the command line does: a run names its model "examples.vla.policy:Policy"
    try:
        main()
    except ShardwiseError as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
