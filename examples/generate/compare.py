"""Greedy tokens of a checkpoint on one device and on layouts of it. Ends by printing one JSON line."""

from __future__ import annotations

import argparse
import json
import sys

import shardwise as sw

PROMPTS = ["def main():", "import os"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="a run's folder, or one of transformers")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--layouts", nargs="*", default=["tp=2", "pp=2"])
    asked = parser.parse_args()
    whole = sw.generate(asked.checkpoint, PROMPTS, max_new_tokens=asked.tokens, stop=())
    told = {"tokens": sum(map(len, whole.tokens)), "one_device": round(whole.figures.decode_tokens_per_s, 1)}
    equal = True
    for layout in asked.layouts:
        made = sw.generate(asked.checkpoint, PROMPTS, layout=layout, max_new_tokens=asked.tokens, stop=())
        equal = equal and made.tokens == whole.tokens
        told[layout] = round(made.figures.decode_tokens_per_s, 1)
    print(json.dumps({"equal": equal, **told}))
    if not equal:
        sys.exit(1)


if __name__ == "__main__":
    main()
