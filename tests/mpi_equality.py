"""Layouts whose ranks exchange through MPI alone, beside one device.

    mpirun -np 2 python tests/mpi_equality.py FILE dp=2 pp=2 pp=2+shared-memory

Rank 0 writes the errors of every comparison.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers as hf

from shardwise.comm.mpi_backend import MPI_BACKEND, may_share_memory, start_mpi
from shardwise.comm.mpi_world import mpi_world
from shardwise.launch import LaunchedRanks, RankContext, RankStarter
from shardwise.verify import verify

BESIDE = "+shared-memory"  # behind a layout: ranks of one host go around MPI
STEPS = 2

Errors = dict[str, object]


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
        )
    )


def mixtral() -> torch.nn.Module:
    torch.manual_seed(0)
    model = hf.MixtralForCausalLM(
        hf.MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            use_cache=False,
        )
    )
    model.set_experts_implementation("grouped_mm")
    return model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (8, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def main(results: Path, layouts: Sequence[str]) -> None:
    torch.set_num_threads(1)
    world = mpi_world()
    found: dict[str, Errors] = {}
    with RankStarter() as starter:  # of the one device; the other ranks start nothing
        for shared in (False, True):
            chosen = [layout for layout in layouts if layout.endswith(BESIDE) is shared]
            compare(world.rank, world.size, chosen, shared, starter, found)
    if world.rank == 0:
        results.write_text(json.dumps(found))


def compare(
    rank: int, size: int, layouts: Sequence[str], shared: bool, starter: RankStarter, found: dict[str, Errors]
) -> None:
    """All of `layouts`, in a default group of their own."""
    start_s = time.monotonic()
    store = start_mpi(shares_memory=shared)
    dist.init_process_group(MPI_BACKEND, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=100))
    assert may_share_memory() is shared
    context = RankContext(rank=rank, world_size=size, local_rank=rank, rendezvous="")
    ranks = LaunchedRanks(context, store)
    if rank > 0:
        ranks.serve()
    else:
        for name in layouts:
            model = mixtral() if "ep=" in name else llama()
            layout = name.removesuffix(BESIDE)
            said = verify(model, batch(), layout=layout, steps=STEPS, starter=starter, launched=ranks)
            print(f"{name}: {said.equal} after {time.monotonic() - start_s:.0f} s", flush=True)
            found[name] = {
                "equal": said.equal,
                "loss": said.loss_error,
                "gradient": said.gradient_error,
                "weight": said.weight_error,
                "text": str(said),
            }
        ranks.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
