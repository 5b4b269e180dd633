"""Greedy tokens of a checkpoint on one device and on layouts of it. Ends by printing one JSON line.

    {"equal": true, "tokens": 512, "differs": {}, "one device": 70.1, "tp=2": 55.2, "pp=2": 61.0}

`tokens` were compared with each layout; figures are tokens a second behind the first of each prompt. `differs` tells of
a layout with other tokens the first one: [prompt, token]. The prompts are of different lengths, so the batch is padded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import shardwise as sw

PROMPTS = ["def main():", "import os", "class Reader(Base):\n    def __init__(self"]

Rows = Sequence[Sequence[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run's folder, or one of transformers")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--layouts", nargs="*", default=["tp=2", "pp=2"])
    asked = parser.parse_args()
    whole = sw.generate(asked.checkpoint, PROMPTS, max_new_tokens=asked.tokens, stop=())
    speeds = {"one device": round(whole.figures.decode_tokens_per_s, 1)}
    differs = {}
    for layout in asked.layouts:
        made = sw.generate(asked.checkpoint, PROMPTS, layout=layout, max_new_tokens=asked.tokens, stop=())
        speeds[layout] = round(made.figures.decode_tokens_per_s, 1)
        if made.tokens != whole.tokens:
            differs[layout] = first_difference(whole.tokens, made.tokens)
    tokens = sum(map(len, whole.tokens))
    print(json.dumps({"equal": not differs, "tokens": tokens, "differs": differs, **speeds}))
    if differs:
        sys.exit(1)


def first_difference(one: Rows, other: Rows) -> tuple[int, int]:
    """The earliest token that differs: (prompt, token)."""
    pairs = [(row, list(zip(a, b, strict=False))) for row, (a, b) in enumerate(zip(one, other, strict=True))]
    found = [(next((i for i, (x, y) in enumerate(pair) if x != y), len(pair)), row) for row, pair in pairs]
    token, row = min(found)
    return row, token


if __name__ == "__main__":
    main()
