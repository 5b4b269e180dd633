"""transformers' Llama, and its own tensor parallelism: a saved checkpoint, loaded by both ranks with the model's plan.

transformers is imported when a model is made.
"""

from __future__ import annotations

import importlib
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from benchmarks.tensor.model import Shape

__all__ = ["llama_of", "parallel_llama"]


def llama_of(shape: Shape) -> nn.Module:
    """transformers' Llama in the sizes of a shape, the same on every rank."""
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.sequence,
        use_cache=False,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def parallel_llama(model: Any) -> nn.Module:
    """`llama_of`'s model saved by rank 0 and loaded again, divided between two ranks. Collective."""
    distributed: Any = importlib.import_module("transformers.distributed")
    importlib.import_module("transformers.utils.logging").disable_progress_bar()
    with tempfile.TemporaryDirectory() as own:
        folder: list[Any] = [own]
        dist.broadcast_object_list(folder, src=0)
        if dist.get_rank() == 0:
            model.save_pretrained(folder[0])
        dist.barrier()
        loaded: nn.Module = type(model).from_pretrained(
            folder[0], distributed_config=distributed.DistributedConfig(tp_size=2, tp_plan="auto")
        )
        dist.barrier()  # until both have read it
    return loaded.train(model.training)
