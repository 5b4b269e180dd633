"""What is known of the software that a source ran: which kernels, which precision, what overlaps; each with its reason.

One entry a file of the table, because what a source ran stands beside its table and not in it; of a file that is not
named, what its rows' columns say (`_said`). Nothing here is fitted, and nothing depends on a row's model or layout.
"""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from benchmarks.planner.devices import has_flash_attention
from benchmarks.planner.rows import Row

__all__ = ["TODAY", "Stack", "stack_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack:
    """fused_attention: scores stay in the processor (flash-attention 2, SDPA), masked halves left out; else products of
        batches with a fused masked softmax and dropout between them in memory.
    dropout: of probabilities, attention and MLP outputs. rotary, gated norms etc. follow the architecture.
    compiled: whether chains of elementwise operations are one kernel.
    split: "even" layers a stage, "ends" one less on the first and the last, "costs" by nanotron's rule.
    summed_bytes: of one element of the gradients in which micro-batches are added up; wire_bytes: of one that is sent.
    overlap: whether replicas sum gradients beside the last backward; overlap_divided: also where they divide states.
    hides_shards: whether gathers and scatters of a backward's divided tokens run beside its products.
    scattered_sends: whether of what passes between stages each shard sends its part, gathered inside the host then.
    cuts_by_stages: whether a replica's batch is cut into as many micro-batches as stages where nobody says how many.
    every_second: whether "selective" keeps every second product and attention, not all but what attention keeps.
    inferred: recomputation where the table does not say.
    step_kernels: that the host starts for each tensor in the optimizer's step; 0: a few for all of them together.
    by_tensor: whether replicas sum and gather tensor by tensor, as many at a time as a library has channels.
    """

    name: str
    fused_attention: bool = True
    dropout: bool = False
    compiled: bool = False
    split: str = "even"
    summed_bytes: int = 4
    wire_bytes: int = 4
    overlap: bool = True
    overlap_divided: bool = True
    hides_shards: bool = True
    scattered_sends: bool = False
    cuts_by_stages: bool = False
    every_second: bool = False
    padded_vocab: int = 128
    inferred: str = "none"
    step_kernels: int = 0
    by_tensor: bool = False


_MEGATRON_2021 = Stack(
    name="Megatron-LM, Megatron-DeepSpeed (2021 to 2022)",  # before flash-attention; dropout 0.1
    fused_attention=False,
    dropout=True,
    summed_bytes=2,  # fp16 gradients, added up in place, unscaled by the optimizer
    wire_bytes=2,
    scattered_sends=True,  # Narayanan et al. 2021 (arXiv:2104.04473), section 4.1; DeepSpeed's partitioned pipes
    overlap=False,  # gradients are summed behind the last backward (use_gradient_bucket=false; local DDP)
)
TODAY = Stack(name="Megatron Core and TransformerEngine")  # cuDNN fused attention, distributed optimizer with overlap
_JAX = Stack(name="MaxText, Paxml", compiled=True, inferred="full")  # XLA; scanned layers save their inputs alone
# FSDP2: parameters gathered in bf16, gradients scattered in float32; compiled blocks in most rows
_TORCHTITAN = Stack(name="torchtitan", compiled=True, every_second=True, cuts_by_stages=True, padded_vocab=1)
_STACKS = MappingProxyType(
    {
        "vtrain_ground_truth_single.csv": _MEGATRON_2021,
        "vtrain_ground_truth_multi.csv": _MEGATRON_2021,
        "bloom_176b_prequel_layouts.csv": _MEGATRON_2021,
        "megatron_sc21_table1.csv": dataclasses.replace(_MEGATRON_2021, summed_bytes=4, wire_bytes=4),
        "megatron_sc21_table2_zero3_vs_ptdp.csv": _MEGATRON_2021,
        "bigscience_v100_gpt.csv": _MEGATRON_2021,
        # Zero Bubble: Megatron-LM of 2023 without recomputation; dropout is on (its memory is 34 + 5 a s / h a token)
        "zero_bubble_pp.csv": dataclasses.replace(_MEGATRON_2021, name="Megatron-LM (2023)", split="ends"),
        # nanotron: flash-attention 2, Triton RMSNorm, float32 gradient accumulator whose hooks sum
        # beside the backward, while ZeRO-1 scatters gradients behind it (zero_reduce_scatter in the optimizer's step)
        "hf_ultrascale_playbook_benchmarks.csv": Stack(
            name="nanotron",
            split="costs",
            padded_vocab=1,
            overlap_divided=False,
            by_tensor=True,  # hooks of each parameter; coalesced reduce-scatters and gathers of one each
            step_kernels=4,  # a norm and a scale of each gradient to clip it, its copy, and the parameter's 16-bit copy
        ),
        "torchtitan.csv": _TORCHTITAN,
        "nvidia_dgxc_benchmarking.csv": TODAY,
        "nvidia_nemo_24.07_performance.csv": TODAY,
        "nvidia_megatron_bridge_performance.csv": TODAY,
        "megatron_lm_llama3_fp8_h100.csv": TODAY,
        "moe_modelzoo_qwen3.csv": TODAY,
    }
)


def stack_of(row: Row) -> Stack:
    """The stack of a source by the name of its file, or by what the row's columns say of it; notes say where a row ran
    on another, or was not compiled."""
    stack = _STACKS.get(row.file) or _said(row)
    if row.in_jax:
        stack = _JAX
    if row.compiled is not None and stack is not _JAX:
        stack = dataclasses.replace(stack, compiled=row.compiled)
    if row.hides_shards is not None:
        stack = dataclasses.replace(stack, hides_shards=row.hides_shards)
    if "per-op sac" in row.recompute.lower() and not stack.every_second:
        stack = dataclasses.replace(stack, every_second=True)
    if stack.fused_attention and not has_flash_attention(row.gpu):
        stack = dataclasses.replace(stack, fused_attention=False)
    return stack


def _said(row: Row) -> Stack:
    """Of a source that is not named: in float16 alone trained what came before bfloat16 and fused attention; FSDP2
    keeps float32 parameters, divided, and gathers them in 16 bit, as torchtitan does; else today's."""
    precision, zero = row.precision.lower(), row.zero.lower()
    if "fp16" in precision and "bf16" not in precision:
        return _MEGATRON_2021
    if "fsdp" in zero and "megatron" not in zero:
        return _TORCHTITAN
    return TODAY
