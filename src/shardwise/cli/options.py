"""Options that several verbs share. Knows typer; starts nothing."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Overrides", "RunFile"]

RunFile = Annotated[
    str, typer.Argument(metavar="RUN.toml", help="The run; examples/demo.toml is one to copy.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Set a value of the run file, such as training.steps=50 or layout=pp=4. May be repeated.",
    ),
]
