"""A process that takes names, of an architecture and layouts, on its input and answers with lines of JSON.

First `{"ready": true}`; then for each architecture a row after every step, which grows: the model, then each layout.
The last one has `done`. Memory is limited here, time is watched by who started it. Nothing that an architecture
prints reaches the answers.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

MEMORY_BYTES = 14 * 2**30


def answers(architecture: str, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What came of an architecture: of the model, then of each layout that is wanted."""
    from benchmarks.coverage.case import NotTrainedError, find_case
    from benchmarks.coverage.kinds import weights_by_kind
    from benchmarks.coverage.layouts import layouts

    started = time.monotonic()
    row: dict[str, Any] = {"architecture": architecture, "trained": False, "layouts": {}}
    try:
        case = find_case(architecture)
    except NotTrainedError as reason:
        yield {**row, "reason": str(reason), "seconds": round(time.monotonic() - started, 2)}
        return
    row |= {
        "trained": True,
        "class": type(case.model).__name__,
        "policy": case.policy,
        "inputs": case.inputs,
        "own_loss": case.loss is None,
        "parameters": sum(parameter.numel() for parameter in case.model.parameters()),
        "weights": weights_by_kind(case.model),
    }
    for name, verify in layouts(case).items():
        yield {**row, "seconds": round(time.monotonic() - started, 2)}
        row["layouts"][name] = dataclasses.asdict(verify()) if name in wanted else None
    yield {**row, "seconds": round(time.monotonic() - started, 2)}


def main() -> None:
    """Serve until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    from benchmarks.coverage import case, kinds, layouts  # noqa: F401  now, so that a row is of one state of the code

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()

    def say(row: dict[str, Any]) -> None:
        out.write(json.dumps(row) + "\n")
        out.flush()

    say({"ready": True})
    for line in sys.stdin:
        architecture, *wanted = line.split()
        row: dict[str, Any] = {"architecture": architecture, "trained": False, "layouts": {}}
        try:
            for row in answers(architecture, wanted):
                say(row)
        except Exception as error:
            row["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        say({**row, "done": True})
        gc.collect()


if __name__ == "__main__":
    main()
