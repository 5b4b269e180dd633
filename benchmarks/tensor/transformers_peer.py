"""transformers' own tensor parallelism: a saved checkpoint, loaded by both ranks with the plan that it carries."""

from __future__ import annotations

import tempfile
from typing import Any

import torch.distributed as dist
import torch.nn as nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.utils import logging

__all__ = ["parallel_llama"]


def parallel_llama(model: nn.Module, rank: int) -> nn.Module:
    """`model` saved by rank 0 and loaded again, divided between two ranks. Collective."""
    assert isinstance(model, PreTrainedModel)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as own:
        folder: list[Any] = [own]
        dist.broadcast_object_list(folder, src=0)
        if rank == 0:
            model.save_pretrained(folder[0])
        dist.barrier()
        loaded: nn.Module = LlamaForCausalLM.from_pretrained(
            folder[0], distributed_config=DistributedConfig(tp_size=2, tp_plan="auto")
        )
        dist.barrier()  # until both have read it
    return loaded.train(model.training)
