"""Proves on real gradients that a model split over processes is the model on one device.

    python examples/any_model.py --model t5 --layout pp=2
    python examples/any_model.py --model bloom --layout tp=2,pp=2
    python examples/any_model.py --model qwen3_moe --layout ep=2,dp=2
    python examples/any_model.py --all                       every model, on the layouts of LAYOUTS

Prints what `shardwise.verify` found: the errors of loss, gradients and updated weights, what crosses between the
stages, and of the parameters of the blocks' matrix products the share that is divided. The exit status is 1 if anything
differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence

import transformers
from models import DECODERS, MODELS, POLICIES, make

import shardwise as sw
from shardwise.launch import RankStarter

PRELOAD = ("shardwise.verify", "transformers", "models")
LAYOUTS = ("pp=2", "pp=3", "dp=2,pp=2", "tp=2", "tp=2,pp=2")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        choices=sorted({**MODELS, **DECODERS, **POLICIES}),
        action="append",
        help="may be given several times",
    )
    parser.add_argument("--all", action="store_true", help="every model")
    parser.add_argument("--layout", action="append", help='such as "dp=2,pp=2"; may be given several times')
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps after which weights are compared")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    options = parser.parse_args(arguments)
    if not (options.all or options.model):
        parser.error("name a --model, or give --all")
    transformers.logging.set_verbosity_error()
    names = [*MODELS, *DECODERS, *POLICIES] if options.all else options.model
    layouts = options.layout or (LAYOUTS if options.all else LAYOUTS[:1])
    with RankStarter(preload=PRELOAD) as starter:
        rows = list(_verified(names, layouts, options.steps, options.dtype, starter, details=not options.all))
    print()
    print(f"{'model':18s} {'layout':12s} {'gradient error':>14s} {'sharded':>8s} {'seconds':>8s}")
    for name, layout, comparison, seconds in rows:
        verdict = "" if comparison.equal else f"   NOT EQUAL: {comparison.first_difference}"
        share = "" if comparison.tensor is None else f"{comparison.tensor.sharded_share:.0%}"
        print(f"{name:18s} {layout:12s} {comparison.gradient_error:14.1e} {share:>8s} {seconds:8.1f}{verdict}")
    return 0 if all(comparison.equal for _, _, comparison, _ in rows) else 1


def _verified(
    names: Sequence[str], layouts: Sequence[str], steps: int, dtype: str, starter: RankStarter, *, details: bool
) -> Iterator[tuple[str, str, sw.Comparison, float]]:
    for name in names:
        example = make(name)
        for layout in layouts:
            start = time.perf_counter()
            comparison = sw.verify(
                example.model,
                example.batch,
                layout=layout,
                loss=example.loss,
                steps=steps,
                dtype=dtype,
                starter=starter,
            )
            seconds = time.perf_counter() - start
            if details or not comparison.equal:
                print(f"{name} on {comparison}\n", flush=True)
            else:
                print(
                    f"{name:18s} {layout:12s} equal, worst gradient error {comparison.gradient_error:.1e}", flush=True
                )
            yield name, layout, comparison, seconds


if __name__ == "__main__":
    sys.exit(main())
