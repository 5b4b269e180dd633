"""The command line: one file a verb. Knows which verbs there are; each is imported only when it is called.

The only place that prints. Errors that shardwise raises on purpose are shown without a traceback; exit status 1 for
them, 2 for a wrong command line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType

import typer

from shardwise.errors import LaunchError, ShardwiseError
from shardwise.launch.environment import World, read_world

__all__ = ["VERBS", "main", "run_command"]

# verb -> (module with a function `command`, one line of help)
VERBS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "plan": ("shardwise.cli.plan", "Show how a model is split: stages, memory, traffic, the schedule."),
        "verify": ("shardwise.cli.verify", "Prove that a layout computes what one device computes."),
        "train": ("shardwise.cli.train", "Train: starts the processes here, or joins those of torchrun, SLURM, MPI."),
        "probe": ("shardwise.cli.probe", "Measure this machine, for plans: rates, exchanges, overheads."),
        "report": ("shardwise.cli.report", "Show predicted beside measured: a run's time, memory, traffic."),
        "rehearse": ("shardwise.cli.rehearse", "Run one rank of a job whose machine is not there: memory, traffic."),
        "draw": ("shardwise.cli.draw", "Draw a pipeline schedule as text."),
        "launch": ("shardwise.cli.launch", "Write and submit a batch script for SLURM."),
        "generate": ("shardwise.cli.generate", "Continue prompts with a run or a checkpoint, under any layout."),
        "export": ("shardwise.cli.export", "Make a transformers folder of a run's checkpoint."),
    }
)

# verbs that every rank of torchrun, srun or mpirun takes part in; of the others rank 0 speaks for all
_BY_ALL_RANKS = frozenset({"train", "verify", "generate"})

_HELP = """Model parallelism for any PyTorch model.

A run is one TOML file; examples/demo.toml is one to copy:

    shardwise plan   run.toml    how it is split, before anything is trained
    shardwise train  run.toml    starts the processes, shows progress, saves
    shardwise verify run.toml    the same gradients as on one device?

Any value can be set from here: --set training.steps=50 --set layout=dp=2,pp=2

`shardwise VERB --help` tells more of each.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of `shardwise`; ends the process with the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    launched = _world(given) is not None
    try:
        status = run_command(given)
    except Exception as error:
        if not launched:
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    if status != 0 and launched:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # among ranks of a launcher nothing is ended in order: the others may not answer any more
    sys.exit(status)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line, without the program's name; returns its exit status."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # "module:function" of a run is found beside it
    try:
        world = _world(arguments)
        if world is not None and world.rank > 0 and arguments[0] not in _BY_ALL_RANKS:
            return 0
        _application(arguments[0] if arguments else "")(args=list(arguments), prog_name="shardwise")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except ShardwiseError as error:
        print(f"shardwise: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(f"({note})", file=sys.stderr)
        return 1
    except Exception as error:
        if not isinstance(error.__cause__, LaunchError):
            raise
        print(f"shardwise: {error.__cause__}", file=sys.stderr)  # raised on a rank: its own traceback says where
        return 1
    except KeyboardInterrupt:
        print("shardwise: interrupted", file=sys.stderr)
        return 130
    return 0


def _world(arguments: Sequence[str]) -> World | None:
    """Where another launcher has put this process; a broken environment is the verb's to tell."""
    if not arguments or arguments[0] not in VERBS:
        return None
    try:
        return read_world()
    except LaunchError:
        return None


def _application(verb: str) -> typer.Typer:
    """All verbs, of which only the one that is called is imported."""
    application = typer.Typer(
        help=_HELP,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name, (module, summary) in VERBS.items():
        function: Callable[..., None] = import_module(module).command if name == verb else _not_called
        application.command(name, short_help=summary)(function)
    return application


def _not_called() -> None:
    """Stands for a verb that is listed and not called."""
