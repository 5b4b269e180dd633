"""A process that takes names, of an architecture and layouts, on its input and answers with one line of JSON each.

Its memory is limited, its time is watched by who started it. Nothing that an architecture prints reaches the answers.
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
from collections.abc import Sequence
from typing import Any

MEMORY_BYTES = 14 * 2**30


def answer(architecture: str, wanted: Sequence[str]) -> dict[str, Any]:
    """What came of an architecture: of the model, then of each layout that is wanted."""
    from benchmarks.coverage.case import NotTrainedError, find_case
    from benchmarks.coverage.layouts import layouts

    started = time.monotonic()
    row: dict[str, Any] = {"architecture": architecture, "trained": False, "layouts": {}}
    try:
        case = find_case(architecture)
    except NotTrainedError as reason:
        return {**row, "reason": str(reason), "seconds": round(time.monotonic() - started, 2)}
    row |= {
        "trained": True,
        "class": type(case.model).__name__,
        "policy": case.policy,
        "inputs": case.inputs,
        "own_loss": case.loss is None,
        "parameters": sum(parameter.numel() for parameter in case.model.parameters()),
    }
    for name, verify in layouts().items():
        row["layouts"][name] = dataclasses.asdict(verify(case)) if verify is not None and name in wanted else None
    return {**row, "seconds": round(time.monotonic() - started, 2)}


def main() -> None:
    """Serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for line in sys.stdin:
        architecture, *wanted = line.split()
        try:
            row = answer(architecture, wanted)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            row = {"architecture": architecture, "trained": False, "layouts": {}, "reason": reason, "seconds": 0.0}
        answers.write(json.dumps(row) + "\n")
        answers.flush()
        gc.collect()


if __name__ == "__main__":
    main()
