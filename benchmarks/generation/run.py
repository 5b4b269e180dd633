"""One llama with weights of its own, prompts of one length, greedy: transformers on one process, then every layout.

All take turns, so that what else runs on the machine is shared; the median is told. Prints a table, writes the results,
ends with one line of JSON. `equal` says whether every layout gave the tokens of transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import shardwise as sw
from benchmarks.common.circumstances import circumstances

__all__ = ["main"]

LAYOUTS = ("", "tp=2", "pp=2", "dp=2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A llama, and what it is asked."""

    hidden: int
    layers: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    rounds: int


SHAPES = {
    "full": Shape(hidden=512, layers=8, prompts=8, prompt_tokens=64, new_tokens=64, rounds=3),
    "quick": Shape(hidden=64, layers=2, prompts=2, prompt_tokens=8, new_tokens=4, rounds=1),
}


def model_of(shape: Shape) -> Any:
    """Weights so large that no two tokens are about as likely."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=4096,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 3 * shape.hidden**-0.5)
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model


def transformers_alone(
    model: Any, prompts: torch.Tensor, new_tokens: int
) -> tuple[list[tuple[int, ...]], float, float]:
    """Tokens, seconds until the first of them, and tokens a second behind it."""

    def timed(tokens: int) -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        with torch.no_grad():
            out = model.generate(prompts, max_new_tokens=tokens, do_sample=False)
        return out, time.perf_counter() - start

    _, first_s = timed(1)
    out, whole_s = timed(new_tokens)
    rows = [tuple(row) for row in out[:, prompts.shape[1] :].tolist()]
    return rows, first_s, len(prompts) * (new_tokens - 1) / max(1e-9, whole_s - first_s)


def measure(shape: Shape, layouts: Sequence[str]) -> dict[str, Any]:
    """Medians over the rounds, by contender."""
    model = model_of(shape)
    prompts = torch.randint(1, 4096, (shape.prompts, shape.prompt_tokens), generator=torch.Generator().manual_seed(1))
    taken: dict[str, list[dict[str, Any]]] = {}
    equal = True
    for _ in range(shape.rounds):
        expected, first_s, rate = transformers_alone(model, prompts, shape.new_tokens)
        taken.setdefault("transformers", []).append({"first_token_s": first_s, "decode_tokens_per_s": rate})
        for layout in layouts:
            made = sw.generate(model, prompts.tolist(), layout=layout, max_new_tokens=shape.new_tokens, stop=())
            equal = equal and list(made.tokens) == expected
            figures = dataclasses.asdict(made.figures)
            taken.setdefault(layout or "one device", []).append(
                {name: figures[name] for name in ("first_token_s", "decode_tokens_per_s", "cache_bytes")}
            )
    return {"equal": equal, "contenders": {name: _median(each) for name, each in taken.items()}}


def _median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: round(statistics.median(each[name] for each in rounds), 4) if isinstance(value, float) else value
        for name, value in rounds[0].items()
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation")
    parser.add_argument("--quick", action="store_true", help="small: shows that it runs")
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS))
    asked = parser.parse_args()
    torch.set_num_threads(1)  # as every rank has
    size = "quick" if asked.quick else "full"
    found = measure(SHAPES[size], asked.layouts)
    print(f"{'':14s}{'first token, s':>16s}{'tokens/s':>12s}   cache, bytes a rank")
    for name, figures in found["contenders"].items():
        print(
            f"{name:14s}{figures['first_token_s']:16.3f}{figures['decode_tokens_per_s']:12.1f}   "
            f"{figures.get('cache_bytes', '')}"
        )
    told = {**circumstances("benchmarks.generation"), "shape": dataclasses.asdict(SHAPES[size]), **found}
    if not asked.quick:
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        (folder / "generation.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(told))
