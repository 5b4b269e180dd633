"""The largest searches: Llama-3-405B on 16,384 H100s, a mixture like DeepSeek-V3 on 2,048; seconds on one core.

    python -m benchmarks.planner.largest [--json]

Prints how long the whole search took, the best layouts, and their predicted MFU beside what was published: 38 to 43 %
for Llama-3-405B (arXiv:2407.21783, table 4), 38.9 % causal for DeepSeek-V3 (in fp8, while bf16 is priced here).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Sequence

from benchmarks.planner.shapes import Architecture, Shard
from benchmarks.planner.stacks import TODAY, Stack
from benchmarks.planner.stages import stages_of
from shardwise.describe.catalogue import named_cluster
from shardwise.describe.cluster import Cluster
from shardwise.layout import Layout
from shardwise.plan.chain_works import ChainWorks
from shardwise.plan.explain_search import ranking_table
from shardwise.plan.job import Job, PerParameter
from shardwise.plan.pricer import Pricer
from shardwise.plan.search import Search, search_layouts
from shardwise.plan.space import Limits
from shardwise.plan.stage_work import StageWork

__all__ = ["DEEPSEEK", "LLAMA_405B", "Large", "limits_of", "main", "works_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Large:
    """A model and its machine. blocks: kinds of layers, in order, with how many follow each other. theirs: the layout
    that was published, as far as it is known."""

    name: str
    blocks: tuple[tuple[Architecture, int], ...]
    tokens: int
    global_batch: int
    cluster: str
    published: str
    theirs: str


_LLAMA = Architecture(
    layers=126,
    hidden=16384,
    ffn=53248,
    mats=3,
    heads=128,
    kv_heads=8,
    head_dim=128,
    vocab=128256,
    tied=False,
)
# 128 heads of 128 with 8 heads of keys and values have about the parameters and flops of its latent attention.
_DENSE = Architecture(
    layers=3, hidden=7168, ffn=18432, mats=3, heads=128, kv_heads=8, head_dim=128, vocab=129280, tied=False
)
_MIXTURE = dataclasses.replace(_DENSE, layers=58, experts=256, top_k=8, expert_ffn=2048, shared=2048)
LLAMA_405B = Large(
    name="Llama-3-405B",
    blocks=((_LLAMA, 126),),
    tokens=8192,
    global_batch=2048,  # 16 M tokens
    cluster="h100x8x2048",
    published="38 to 43 % (arXiv:2407.21783, table 4; 41 % with the layout below)",
    # tp, cp, pp, dp and the batch are those of the table; how many stages a rank is not said: one layer each
    theirs="tp=8,sequence_parallel=on,pp=16,fsdp=128,zero=1,micro_batches=16,schedule=interleaved,chunks=8",
)
DEEPSEEK = Large(
    name="like DeepSeek-V3",
    blocks=((_DENSE, 3), (_MIXTURE, 58)),
    tokens=4096,
    global_batch=15360,  # 63 M tokens
    cluster="h100x8x256",
    published="38.9 % causal, in fp8 (deepseek-ai/DeepSeek-V3, dualpipe)",
    theirs="pp=16,ep=64,fsdp=2,zero=1,micro_batches=120,schedule=dualpipe-v",  # zero=1, 16 stages, experts on 64 ranks
)


def works_of(model: Large, stack: Stack = TODAY) -> ChainWorks:
    """What every unit does: the embedding, each layer, the head. stack: the software that runs it."""
    dtype = "bfloat16"

    def parts(arch: Architecture, layout: Layout, samples: int) -> tuple[StageWork, ...]:
        """Embedding, one layer, head."""
        shard = Shard(
            arch=dataclasses.replace(arch, layers=1),
            samples=samples,
            sequence=math.ceil(model.tokens / layout.cp),
            whole=model.tokens,
            tp=layout.tp,
            cp=layout.cp,
            ep=layout.ep,
            sp=bool(layout.sequence_parallel),
        )
        return stages_of(shard, stack, Layout(pp=3), layout.recompute, dtype=dtype, embeddings_are_layers=True)

    def units(layout: Layout, samples: int) -> tuple[StageWork, ...]:
        made = [(parts(arch, layout, samples), count) for arch, count in model.blocks]
        row = [made[0][0][0], *(layer for part, count in made for layer in [part[1]] * count), made[-1][0][2]]
        return tuple(row)

    return ChainWorks(units, names_of(model))


def names_of(model: Large) -> tuple[str, ...]:
    count = sum(count for _, count in model.blocks)
    return ("embedding", *(f"layers.{index}" for index in range(count)), "head")


def limits_of(model: Large) -> Limits:
    """What tp, cp, ep and pp may divide."""
    arch = model.blocks[0][0]
    return Limits(
        stages=len(names_of(model)),
        tensor={"heads": arch.heads, "heads of keys and values": arch.kv_heads},
        context={"tokens": model.tokens},
        experts=max(arch.experts for arch, _ in model.blocks),
        names=names_of(model),
        recompute=("none", "full"),  # selective is what fused attention does anyway
    )


def search_of(model: Large, cluster: Cluster, *, top: int = 5) -> tuple[Search, float, float]:
    """The search, the seconds that it took, and those that it computed (which others on the core do not lengthen)."""
    job = Job(global_batch=model.global_batch, per_parameter=PerParameter.mixed())
    start, computing = time.perf_counter(), time.process_time()
    found = search_layouts(works_of(model), cluster, job, limits=limits_of(model), top=top)
    return found, time.perf_counter() - start, time.process_time() - computing


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of tables")
    parser.add_argument("--explain", action="store_true", help="the best layout line by line")
    options = parser.parse_args(arguments)
    figures: dict[str, dict[str, object]] = {}
    for model in (LLAMA_405B, DEEPSEEK):
        found, seconds, computed = search_of(model, _cluster(model.cluster))
        best = found[0]
        theirs = found.explorer.pricer(Layout.parse(model.theirs), exact=True)
        pricer = found.explorer.pricer
        plain = works_of(model, dataclasses.replace(TODAY, hides_shards=False))
        shown = Pricer(plain, pricer.cluster, pricer.job, pricer.limits)(theirs.layout, exact=True)
        figures[model.name] = {
            "seconds": round(seconds, 2),
            "cpu_seconds": round(computed, 2),
            "layouts": found.num_layouts,
            "priced": found.num_priced,
            "complete": found.complete,
            "layout": str(best.layout),
            "step_s": round(best.step_s, 3),
            "mfu": round(best.ranked.price.mfu, 4),
            "published": model.published,
            "theirs": str(theirs),
            "theirs_mfu": round(theirs.price.mfu, 4),
            "theirs_shown_mfu": round(shown.price.mfu, 4),
        }
        if options.json:
            continue
        print(f"{model.name} on {model.cluster}, {model.global_batch} samples of {model.tokens} tokens")
        print(
            f"  {found.num_layouts} layouts that keep all rules, {found.num_priced} priced, "
            f"in {seconds:.2f} s ({computed:.2f} s of one core)"
        )
        print(f"  predicted {best.ranked.price.mfu:.1%} MFU; published {model.published}")
        print(f"  the published layout, predicted: {theirs.price.mfu:.1%} MFU, {theirs}")
        print(f"  ... where collectives of shards do not run beside products: {shown.price.mfu:.1%} MFU")
        print("\n".join(ranking_table([plan.ranked for plan in found])))
        if options.explain:
            print(best.explain())
            print("\n".join(f"  {change}" for change in best.changes()))
        print()
    if options.json:
        print(json.dumps(figures))


@functools.cache
def _cluster(name: str) -> Cluster:
    return named_cluster(name)


if __name__ == "__main__":
    main()
