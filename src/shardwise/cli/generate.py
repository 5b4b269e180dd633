"""`shardwise generate`: continues prompts and shows the text as it comes; figures go to stderr, or into JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from shardwise.errors import ConfigError
from shardwise.files import read_text
from shardwise.generate import Continued, generate
from shardwise.generate.checkpoint import checkpoint_at
from shardwise.generate.prompts import Stream, tokenizer_at
from shardwise.launch import read_world
from shardwise.quantities import format_bytes

__all__ = ["command"]


def command(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A run's folder, one of its checkpoints, a transformers folder.")
    ],
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]…", help="Texts to continue; from stdin, if none is given.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="Prompts, one a line, behind those given here.")
    ] = None,
    token_numbers: Annotated[
        bool, typer.Option("--token-numbers", metavar="", help="Prompts and text are numbers of tokens.")
    ] = False,
    layout: Annotated[str, typer.Option(metavar="LAYOUT", help="Such as tp=2, pp=2 or dp=2,tp=2.")] = "",
    max_new_tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", min=1, help="At most so many a prompt.")
    ] = 128,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token each time.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the likeliest so many; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that have this probability together.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what has been said is less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of draws; the same text on any layout.")] = 0,
    stop: Annotated[
        list[int] | None, typer.Option(metavar="TOKEN", help="Ends a text; may be repeated. Else the model's own.")
    ] = None,
    no_stop: Annotated[bool, typer.Option("--no-stop", metavar="", help="No token ends a text.")] = False,
    micro_batches: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="That fill a pipeline; else as many as stages.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Of weights, such as bfloat16; else the checkpoint's.")] = None,
    backend: Annotated[
        str, typer.Option(metavar="auto|gloo|nccl|mpi", help="How ranks exchange; mpi: through the MPI of mpirun.")
    ] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="One JSON object: texts, tokens, and figures.")
    ] = False,
) -> None:
    """Continue prompts with a model that a run has trained, or any causal or encoder-decoder model of transformers.

    The same text on any layout. Starts one process for each rank here; under torchrun, srun or mpirun it is one of
    theirs.

    shardwise generate runs/demo "def main():"

    shardwise generate runs/demo --layout tp=2 --temperature 0.8 --top-p 0.9 "import os"

    shardwise generate exported --layout pp=2 --file prompts.txt --json
    """
    world = read_world()
    first = world is None or world.rank == 0  # who reads prompts, shows texts, and says what is wrong with both
    asked = _prompts(prompts or [], file) if first else []
    tokenizer = tokenizer_at(checkpoint_at(checkpoint).described) if first and not token_numbers else None
    if tokenizer is None and first and not token_numbers:
        raise ConfigError(f"{checkpoint} has no tokenizer to read words with; give --token-numbers")
    shown = None if as_json or not first else _Shown(asked, tokenizer)
    made = generate(
        checkpoint,
        [_numbers(prompt) for prompt in asked] if token_numbers else asked,
        layout=layout,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=() if no_stop else stop,
        tokenizer=tokenizer,
        micro_batches=micro_batches,
        device=device,
        dtype=dtype,
        backend=backend,
        told=None if shown is None else shown.take,
    )
    if not made.first:  # of several processes of a launcher one shows the text
        return
    if shown is None:
        print(json.dumps(_as_json(made, asked, layout)))
        return
    shown.end(made)
    print(_in_words(made), file=sys.stderr)


class _Shown:
    """Texts as they come: that of the first prompt at once, each other one behind the one before."""

    def __init__(self, prompts: list[str], tokenizer: object, write: Callable[[str], object] | None = None) -> None:
        self._prompts = prompts
        self._write = write or sys.stdout.write
        self._streams = [Stream(tokenizer) for _ in prompts]
        self._taken = [0] * len(prompts)
        self._at = -1

    def take(self, prompt: int, token: int) -> None:
        """The next token of a prompt."""
        self._taken[prompt] += 1
        piece = self._streams[prompt].add(token)
        if self._at < 0:
            self._begin(0)
        if prompt == self._at:
            self._show(piece)

    def end(self, made: Continued) -> None:
        """Show what has not been shown."""
        for prompt, tokens in enumerate(made.tokens):
            if prompt > self._at:
                self._begin(prompt)
                self._streams[prompt].restart()
                for token in tokens:
                    self._show(self._streams[prompt].add(token))
            else:
                for token in tokens[self._taken[prompt] :]:
                    self._show(self._streams[prompt].add(token))
            self._show(self._streams[prompt].end() + "\n")

    def _begin(self, prompt: int) -> None:
        self._at = prompt
        if len(self._prompts) > 1:
            self._show(f"── {self._prompts[prompt]}\n")

    def _show(self, text: str) -> None:
        self._write(text)
        sys.stdout.flush()


def _prompts(given: list[str], file: Path | None) -> list[str]:
    """The prompts of the command line, of a file, and else of stdin, one a line."""
    lines = list(given)
    if file is not None:
        lines += read_text(file, what="a file of prompts, one a line,", repair="correct --file").splitlines()
    if not given and file is None:
        lines = sys.stdin.read().splitlines()
    return [line for line in lines if line]


def _numbers(prompt: str) -> list[int]:
    try:
        return [int(word) for word in prompt.split()]
    except ValueError as error:
        raise ConfigError(f"with --token-numbers a prompt is numbers with blanks between, got {prompt!r}") from error


def _as_json(made: Continued, prompts: list[str], layout: str) -> dict[str, object]:
    return {
        "layout": layout,
        "prompts": prompts,
        "texts": list(made.texts),
        "tokens": [list(row) for row in made.tokens],
        "ready_s": round(made.ready_s, 4),
        **{name: round(value, 4) if isinstance(value, float) else value for name, value in
           dataclasses.asdict(made.figures).items()},
    }  # fmt: skip


def _in_words(made: Continued) -> str:
    figures = made.figures
    caches = ", ".join(format_bytes(nbytes) for nbytes in figures.cache_bytes)
    return (
        f"{figures.generated_tokens} tokens behind {figures.prompt_tokens} of prompts; first token after "
        f"{figures.first_token_s:.3f} s, prefill {figures.prefill_tokens_per_s:.0f} tokens/s, then "
        f"{figures.decode_tokens_per_s:.1f} tokens/s; caches of {caches}; ready after {made.ready_s:.1f} s"
    )
