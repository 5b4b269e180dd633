import torch, torch.nn as nn, torch.nn.functional as F, pytest
from torch.utils.checkpoint import checkpoint
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.testing import on_ranks
N, W = 8, 16
BATCH = {"x": torch.linspace(-1, 1, N * W).view(N, W).sin()}

class Model(nn.Module):
    def __init__(self, reentrant=False, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.re = reentrant
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(W, 2*W), nn.GELU(), nn.Linear(2*W, W)) for _ in range(4))
        if tied:
            self.blocks[3][0].weight = self.blocks[0][0].weight
    def forward(self, x):
        if self.re: x = x.clone().requires_grad_()
        for b in self.blocks:
            x = x + (checkpoint(b, x, use_reentrant=True) if self.re else b(x))
        return F.mse_loss(x, torch.zeros_like(x))

class Inner(nn.Module):
    def __init__(self, shared, re):
        super().__init__(); self.a = shared; self.re = re
    def forward(self, x):
        for _ in range(2):
            x = x + (checkpoint(self.a, x, use_reentrant=True) if self.re else self.a(x))
        return x
class Twice(nn.Module):
    """one layer under two reentrant checkpoints inside one unit"""
    def __init__(self, re):
        super().__init__(); torch.manual_seed(0)
        self.inp = nn.Linear(W, W)
        self.blocks = nn.ModuleList(Inner(nn.Linear(W, W), re) for _ in range(2))
    def forward(self, x):
        x = self.inp(x)
        for b in self.blocks: x = b(x)
        return F.mse_loss(x, torch.zeros_like(x))

def compare(rank, layout, make, wanted_of, act):
    num = layout.num_micro_batches(N)
    parts = split(BATCH, micro_batches=num, replicas=layout.dp, weights=lambda _: 1.0)
    wanted = wanted_of()
    program = assemble(make(), parts[0][0].inputs, layout=layout, rank=rank.rank)
    act(program, parts[program.place.replica])
    for name, p in program.parameters.items():
        want = wanted[name]
        if p.grad is None: assert want is None, name; continue
        e = float((p.grad - want).norm() / want.norm())
        assert e < 1e-5, (name, e)
    program.close()

def plain(make, times):
    def of():
        m = make()
        for _ in range(times): m(**BATCH).backward()
        return {n: p.grad for n, p in m.named_parameters()}
    return of

def twice(program, parts):
    program.step(parts, step=0); program.step(parts, step=1)
def once(program, parts):
    for p in program.parameters.values(): p.grad = None
    program.step(parts, step=0)
    for p in program.parameters.values(): p.grad = None
    program.step(parts, step=1)

@on_ranks(2)
def test_accum_dp(rank: RankContext) -> None:
    compare(rank, Layout(dp=2), Model, plain(Model, 2), twice)
@on_ranks(2)
def test_accum_tied_pp(rank: RankContext) -> None:
    make = lambda: Model(tied=True)
    compare(rank, Layout(pp=2, micro_batches=2), make, plain(make, 2), twice)
@on_ranks(2)
def test_reentrant_dp(rank: RankContext) -> None:
    compare(rank, Layout(dp=2), lambda: Twice(True), plain(lambda: Twice(False), 1), once)
@on_ranks(2)
def test_reentrant_around(rank: RankContext) -> None:
    compare(rank, Layout(dp=2), lambda: Model(reentrant=True), plain(Model, 1), once)
@on_ranks(2)
def test_zbv_reentrant(rank: RankContext) -> None:
    compare(rank, Layout(pp=2, micro_batches=4, schedule="zb-v"), lambda: Model(reentrant=True), plain(Model, 1), once)
@on_ranks(2)
def test_eval_between(rank: RankContext) -> None:
    def act(program, parts):
        once(program, parts)
        program.model.eval(); a = program.evaluate(parts).loss; program.model.train()
        for p in program.parameters.values(): p.grad = None
        program.step(parts, step=2)
        g = {n: p.grad.clone() for n, p in program.parameters.items()}
        program.model.eval(); b = program.evaluate(parts).loss; program.model.train()
        assert a == b
        assert all(torch.equal(p.grad, g[n]) for n, p in program.parameters.items())
    compare(rank, Layout(pp=2, micro_batches=4, schedule="dualpipe-v"), lambda: Model(tied=True), plain(lambda: Model(tied=True), 1), act)
