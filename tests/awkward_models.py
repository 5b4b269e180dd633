"""Modules that do between their layers what makes cutting hard: each is one trick. Input (8, 6), answer a scalar."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

WIDTH = 6


class Layer(nn.Module):
    """Linear and tanh with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Awkward(nn.Module):
    """Four layers; a subclass says what happens between them."""

    layer: Any = Layer

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(self.layer() for _ in range(4))
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.register_buffer("seen", torch.zeros(WIDTH))

    def through(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.through(x).square().mean()


class WritesInPlace(Awkward):
    def through(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            x *= self.gain
            x += 1.0
        return x


class WritesIntoAView(Awkward):
    def through(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x) * 1.0
            x[:, number] = x[:, number] * 2.0
            x[2:4, :3].zero_()
        return x


class WritesThroughAnAlias(Awkward):
    def through(self, x: torch.Tensor) -> torch.Tensor:
        a = self.layers[0](x) * 1.0
        view = a.view(4, 2, WIDTH)
        a.mul_(0.5)
        b = self.layers[1](a)
        return self.layers[3](self.layers[2](b + view.reshape(8, WIDTH)))


class AssignsUnderAMask(Awkward):
    def through(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(8) % 3 == 0
        for layer in self.layers:
            x = layer(x) * 1.0
            x[mask] = self.gain
        return x


class FillsACanvas(Awkward):
    """Writes the outputs of layers into a tensor made before them."""

    def through(self, x: torch.Tensor) -> torch.Tensor:
        canvas = torch.zeros(4, 8, WIDTH)
        for number, layer in enumerate(self.layers):
            x = layer(x)
            canvas[number] = x
        return canvas.sum(0)


class CallsAgain(Awkward):
    def through(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.layers, *self.layers[:2], self.layers[0]):
            x = layer(x)
        return x


class Sign(torch.autograd.Function):
    """The sign, with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slope: float) -> torch.Tensor:
        ctx.slope = slope
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0] * ctx.slope, None


class UsesAnAutogradFunction(Awkward):
    def through(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) + 0.1 * Sign.apply(x, 0.5)
        return x


class MapsOverSamples(Awkward):
    """`torch.vmap` inside `torch.vmap`, of a function that also uses what it is not given."""

    def through(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            before, x = x, layer(x)
            mean = before.mean(0)
            with Quiet():
                x = torch.vmap(torch.vmap(lambda a, b, mean=mean: a + 0.1 * b * mean.sum()))(x, before)
        return x


class Quiet(TorchFunctionMode):
    """A mode of the model's own, which does nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class MakesATensorOfNumbers(Awkward):
    """`torch.tensor` looks at tensors among the numbers that it is given."""

    def through(self, x: torch.Tensor) -> torch.Tensor:
        largest = x.abs().max()
        for layer in self.layers:
            x = layer(x) + torch.tensor([0.0, 1.0, largest, 0.0, 1.0, 2.0])
        return x


def remembered(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function with a memory, which a wrapper hides."""
    memory = functools.lru_cache(maxsize=2)(function)

    @functools.wraps(function)
    def wrapper(*args: Any) -> torch.Tensor:
        return memory(*args)

    return wrapper


class RemembersATable(Awkward):
    """The first forward computes a table between the layers, all others find it."""

    @remembered
    def table(self, width: int) -> torch.Tensor:
        return torch.arange(width).div(width).cos()

    def through(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) * self.table(x.shape[-1])
        return x


class Splits(Awkward):
    def through(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for layer in self.layers:
            left, right = layer(x).chunk(2, dim=-1)
            skips.append(right)
            x = torch.cat([right, left], dim=-1)
        return x + torch.cat([skips[0], skips[-1]], dim=-1)


@dataclasses.dataclass
class Outputs:
    hidden: torch.Tensor
    kept: torch.Tensor
    index: torch.Tensor


class Talkative(Layer):
    """Answers a dictionary with a tensor, its own input, a number, integers and None."""

    def forward(self, *, hidden: torch.Tensor, scale: float, mask: torch.Tensor | None = None) -> dict[str, Any]:
        y = super().forward(hidden) * scale
        return {"hidden": y, "input": hidden, "best": y.argmax(-1), "width": WIDTH, "none": mask}


class ReadsDictionaries(Awkward):
    layer = Talkative

    def through(self, x: torch.Tensor) -> torch.Tensor:
        best = torch.zeros(8, dtype=torch.long)
        for layer in self.layers:
            answer = layer(hidden=x, scale=1.0 / WIDTH * 6)
            assert answer["none"] is None
            x = answer["hidden"] + 0.5 * answer["input"] / (answer["width"] - 5)
            best = best + answer["best"]
        return x + torch.nn.functional.one_hot(best % WIDTH, WIDTH)


class Secretive(Layer):
    """Leaves its penalty in an attribute."""

    penalty: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        self.penalty = y.abs().mean()
        return y


class ReadsAttributes(Awkward):
    layer = Secretive

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss = self.through(x).square().mean()
        for layer in self.layers:
            loss = loss + 0.1 * layer.penalty
        return loss


class Collecting(Layer):
    """Appends to a list that it is given, and notes in a dictionary."""

    def forward(self, x: torch.Tensor, seen: list[torch.Tensor], notes: dict[str, torch.Tensor]) -> torch.Tensor:
        y = super().forward(x)
        seen.append(y.mean(0))
        notes[f"call {len(seen)}"] = y.square().sum()
        return y


class FillsLists(Awkward):
    layer = Collecting

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        notes: dict[str, torch.Tensor] = {}
        for layer in self.layers:
            x = layer(x, seen, notes)
        return x.square().mean() + torch.stack(seen).square().sum() + notes["call 2"]


class TakesWithHooks(Awkward):
    """Forward hooks on modules inside the layers collect what the return values do not show."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        taken: list[torch.Tensor] = []
        handles = [
            layer.linear.register_forward_hook(lambda module, args, output: taken.append(output))
            for layer in self.layers
        ]
        try:
            loss = self.through(x).square().mean()
        finally:
            for handle in handles:
                handle.remove()
        return loss + sum(0.2 * tensor.abs().mean() for tensor in taken)


class Routes(Layer):
    """Computes only on the rows that it finds positive: shapes depend on its values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = (self.linear(x).sum(-1) > 0).nonzero().squeeze(-1)
        return x.index_add(0, rows, torch.tanh(self.linear(self.norm(x[rows]))))


class LooksInsideUnits(Awkward):
    layer = Routes


class ReadsParametersBetween(Awkward):
    def through(self, x: torch.Tensor) -> torch.Tensor:
        table = self.gain.expand(8, -1)
        x = x + self.layers[3].linear.bias  # of a unit that is called much later
        for layer in self.layers:
            x = layer(x) * table[:, :WIDTH]
        return nn.functional.linear(x, self.layers[0].linear.weight)


class StopsGradients(Awkward):
    def through(self, x: torch.Tensor) -> torch.Tensor:
        a = self.layers[0](x)
        with torch.no_grad():
            target = self.layers[1](a)
        b = self.layers[2](a.detach())
        return self.layers[3](b) - target + a


class CountsInABuffer(Awkward):
    def through(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            self.seen += 1.0
            x = x + self.seen
        return x


class BranchesOnTheBatch(Awkward):
    def through(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) if bool((self.seen == 0).all()) else layer(-x)
        return x


class TransposesAndExpands(Awkward):
    """What crosses is not contiguous, or repeats itself."""

    def through(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.layers[1](self.layers[0](x)).t()  # (width, batch), transposed
        wide = flat.sum(0, keepdim=True).expand(WIDTH, -1)  # (width, batch), stride 0
        return self.layers[3](self.layers[2]((flat * wide).t()))


class ReusesAnEarlyOutput(Awkward):
    def through(self, x: torch.Tensor) -> torch.Tensor:
        a = self.layers[0](x)
        b = self.layers[1](a)
        c = self.layers[2](a + b)
        return self.layers[3](c + a) + b.relu_() + a


class SplitsAsAListSays(Awkward):
    """Lengths computed from the batch, read as a Python list: the C++ of `tolist` dispatches nothing."""

    def through(self, x: torch.Tensor) -> torch.Tensor:
        lengths = torch.stack([(x > -9).sum(), (x < -9).sum()]) // WIDTH
        for layer in self.layers:
            parts = [layer(part) if part.numel() else part for part in x.split(lengths.tolist())]
            x = torch.cat(parts) * (1.0 / len(lengths.tolist()))
        return x


ALL: tuple[type[Awkward], ...] = (
    SplitsAsAListSays,
    WritesInPlace,
    WritesIntoAView,
    WritesThroughAnAlias,
    AssignsUnderAMask,
    FillsACanvas,
    CallsAgain,
    UsesAnAutogradFunction,
    MapsOverSamples,
    MakesATensorOfNumbers,
    RemembersATable,
    Splits,
    ReadsDictionaries,
    ReadsAttributes,
    FillsLists,
    TakesWithHooks,
    LooksInsideUnits,
    ReadsParametersBetween,
    StopsGradients,
    BranchesOnTheBatch,
    TransposesAndExpands,
    ReusesAnEarlyOutput,
)
