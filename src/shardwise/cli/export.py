"""`shardwise export`: the command around `export`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from shardwise.quantities import format_bytes, parse_bytes
from shardwise.train.export import export

__all__ = ["command"]


def command(
    run: Annotated[str, typer.Argument(metavar="RUN_DIR", help="The folder of a run that saved checkpoints.")],
    folder: Annotated[str, typer.Argument(metavar="OUT", help="Where the model goes; without one yet.")],
    step: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="The checkpoint after so many steps; else the latest.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="Of the weights, such as bfloat16; else as they were trained.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="DIR", help="The run's checkpoints, if not RUN_DIR/checkpoints.")
    ] = None,
    max_file: Annotated[
        str, typer.Option(metavar="BYTES", help="The largest file of weights; more are numbered and indexed.")
    ] = "5GB",
) -> None:
    """Make a transformers folder of a run: weights, config, generation config, tokenizer.

    Whatever layout trained it. `AutoModelForCausalLM.from_pretrained("OUT")` reads it,
    and so does `[model] path = "OUT"` of another run.

    shardwise export runs/demo exported
    shardwise export runs/demo exported --step 100 --dtype bfloat16
    """
    start = time.monotonic()
    files = export(run, folder, step=step, checkpoint=checkpoint, dtype=dtype, max_file_bytes=parse_bytes(max_file))
    for file in files:
        print(f"{format_bytes(file.stat().st_size):>12s}  {file}")
    print(f"exported in {time.monotonic() - start:.1f} s")
