"""Small models with experts, written as people write them: stacked parameters, and modules in a list."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

WIDTH, INNER, EXPERTS, CHOICES, VOCABULARY, TOKENS, SAMPLES = 8, 12, 5, 2, 11, 6, 8


class StackedExperts(nn.Module):
    """Parameters with a dim of experts in front; a loop over those that are hit."""

    def __init__(self) -> None:
        super().__init__()
        self.count = EXPERTS
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / INNER**0.5)
        self.bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, tokens: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(tokens)
        for expert in range(self.count):
            row, choice = torch.where(chosen == expert)
            y = F.gelu(tokens[row] @ self.up[expert]) @ self.down[expert] + self.bias[expert]
            out = out.index_add(0, row, y * gates[row, choice, None])
        return out


class StackedMix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = StackedExperts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, WIDTH)
        gates, chosen = self.router(rows).softmax(-1).topk(CHOICES)
        return self.experts(rows, chosen, gates).view(x.shape)


class CappedMix(StackedMix):
    """Of each sample an expert takes three tokens; further choices are of no expert."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates, chosen = self.router(x).softmax(-1).topk(CHOICES)  # (samples, tokens, choices)
        turn = F.one_hot(chosen, EXPERTS).flatten(1, 2).cumsum(1).view(*chosen.shape, EXPERTS)
        taken = turn.gather(-1, chosen[..., None]).squeeze(-1) <= 3
        chosen = chosen.masked_fill(~taken, EXPERTS).flatten(0, 1)
        return self.experts(x.reshape(-1, WIDTH), chosen, gates.flatten(0, 1)).view(x.shape)


class OneIsAnother(StackedExperts):
    """Expert 3 does something else besides, and is known by its number among all."""

    def forward(self, tokens: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens, chosen, gates) + tokens * (chosen == 3).sum(1, keepdim=True)


class OneIsNeverChosen(StackedMix):
    """A router that, whatever its weights, leaves out the one that differs."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = OneIsAnother()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, WIDTH)
        allowed = torch.arange(EXPERTS) != 3
        gates, chosen = self.router(rows).masked_fill(~allowed, -1e9).softmax(-1).topk(CHOICES)
        return self.experts(rows, chosen, gates).view(x.shape)


class IdentityBeyond(StackedMix):
    """Numbers beyond the experts stand for the token itself."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = _IdentityBeyond()


class _IdentityBeyond(StackedExperts):
    def forward(self, tokens: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        out = super().forward(tokens, chosen, gates)
        return out + tokens * (gates * (chosen >= EXPERTS)).sum(1, keepdim=True)


class OrderedExperts(nn.Module):
    """Rows in the order of their experts, and how many each has."""

    def __init__(self) -> None:
        super().__init__()
        self.count = EXPERTS
        self.matrix = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        parts = rows.split(counts)
        return torch.cat([parts[expert] @ self.matrix[expert] for expert in range(self.count)])


class OrderedMix(nn.Module):
    """Sorts rows by expert itself."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up, self.down = OrderedExperts(), OrderedExperts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, WIDTH)
        gates, chosen = self.router(rows).softmax(-1).topk(CHOICES)
        order = chosen.flatten().argsort(stable=True)
        counts = F.one_hot(chosen.flatten(), EXPERTS).sum(0).tolist()
        token = order // CHOICES
        y = self.down(F.gelu(self.up(rows[token], counts)), counts) * gates.flatten()[order, None]
        return torch.zeros_like(rows).index_add(0, token, y).view(x.shape)


class EvenExperts(nn.Module):
    """As many rows for each expert, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.bmm(rows.view(self.matrix.shape[0], -1, WIDTH), self.matrix).view(-1, WIDTH)


class EvenMix(nn.Module):
    """Every token visits every expert, most of them as zero."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = EvenExperts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, WIDTH)
        gates, chosen = self.router(rows).sigmoid().topk(CHOICES)
        scores = torch.zeros(len(rows), EXPERTS, dtype=rows.dtype).scatter(1, chosen, gates)
        given = rows.repeat(EXPERTS, 1) * scores.t().reshape(-1, 1)
        return self.experts(given).view(EXPERTS, -1, WIDTH).sum(0).view(x.shape)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


class ListedMix(nn.Module):
    """A list of modules, of which those that no token chose are not called; a shared expert beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.shared = Expert()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, WIDTH)
        gates, chosen = self.router(rows).softmax(-1).topk(CHOICES)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, choice = torch.where(chosen == number)
            if row.numel() == 0:
                continue
            out.index_add_(0, row, expert(rows[row]) * gates[row, choice, None])
        return (out + self.shared(rows)).view(x.shape)


class LayersInARow(nn.Module):
    """A list of modules that are alike, one after another: no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, WIDTH)
        for part in self.parts:
            rows = part(rows)
        return rows.view(x.shape)


class DenseMix(nn.Module):
    """Every token goes to every expert by one product: nothing is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("btd,edf->btf", x, self.up)


class DroppingMix(ListedMix):
    """Dropout inside the experts: a mask depends on which rows meet."""

    def __init__(self) -> None:
        super().__init__()
        for expert in self.experts:
            expert.down = nn.Sequential(nn.Dropout(0.3), expert.down)


class Block(nn.Module):
    def __init__(self, mix: type[nn.Module]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = mix()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix(self.norm(x))


class Model(nn.Module):
    def __init__(self, mix: type[nn.Module] = StackedMix, layers: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(mix) for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Regularised(Model):
    """Its own code reads the weights of experts."""

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().forward(ids, labels) + 1e-2 * self.blocks[0].mix.experts.up.square().sum()


def batch(samples: int = SAMPLES) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    labels = torch.randint(0, VOCABULARY, (samples, TOKENS), generator=random)
    labels[0, :3] = labels[5, 1:] = -100  # micro-batches weigh differently
    return {"ids": torch.randint(0, VOCABULARY, (samples, TOKENS), generator=random), "labels": labels}


def weight(inputs: dict[str, torch.Tensor]) -> float:
    return float((inputs["labels"] != -100).sum())
