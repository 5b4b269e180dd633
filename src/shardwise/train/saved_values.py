"""Values of a model by its own names, out of a source: of a tensor that is divided, only what this rank holds is read.

Knows ties, prefixes, and what transformers' files keep otherwise than its classes (`conversions`); refuses to know
layouts: which slices are wanted is said by whoever asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn as nn

from shardwise.checkpoint.load import Target, load_into, load_slices
from shardwise.checkpoint.slices import TensorSlice
from shardwise.checkpoint.source import Source
from shardwise.checkpoint.tensor_file import TORCH_DTYPES
from shardwise.describe.tensor import Slice
from shardwise.errors import CheckpointError
from shardwise.parallel.tensor.slices import cut, local_shape
from shardwise.trace.placing import named_tensors
from shardwise.train.conversions import Merge, merges_of
from shardwise.train.divided import regions_of

__all__ = ["SavedValues", "names_in", "new_values_note"]

Cuts = Sequence[tuple[Slice, int]]  # how a tensor is divided, each with the part that is wanted


class SavedValues:
    """Tensors by the model's names; made while the model still has its shapes.

    A tied tensor is found under any of its names, a transformers model's also without the prefix of its base model,
    renamed, or in pieces. Where the whole base of a transformers model is there, its head may be missing: it has
    `initial` values then. Raises CheckpointError, when asked, for what else is missing or of another shape.
    """

    def __init__(
        self,
        source: Source,
        model: nn.Module,
        initial: Callable[[Sequence[str]], Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        self._source = source
        self._model = model
        self._shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
        self._saved = names_in(source, model)
        self._merges: dict[str, Merge] = {}
        self._made: tuple[Merge | None, dict[str, torch.Tensor]] = (None, {})
        missing = [name for name in self._shapes if name not in self._saved]
        if missing:
            plain, merges = merges_of(model, source.manifest.tensors)
            self._merges = {name: merges[name] for name in missing if name in merges}
            self._saved |= {name: plain[name] for name in missing if name in plain and name not in merges}
        self._initial = initial
        self.new = () if initial is None else self._heads()  # parameters of a head that has initial values

    def __call__(self, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """Whole tensors, in the dtypes in which they were saved."""
        return {name: self.read(name, ()) for name in names}

    def read(self, name: str, cuts: Cuts) -> torch.Tensor:
        """The part of a tensor that `cuts` say, of which only the bytes are read."""
        if name in self.new:
            assert self._initial is not None
            return _cut(self._initial([name])[name], cuts)
        merge = self._merges.get(name)
        if merge is not None:
            return self._merged(name, merge, cuts)
        shape = self._shapes[name]
        source = self._source.renamed({name: self._saved.get(name, name)})
        own, dims = shape, [part.dim % max(1, len(shape)) for part, _ in cuts]
        if len(set(dims)) < len(dims):  # a dim that is cut twice
            return _cut(self._whole(source, name), cuts)
        for part, rank in cuts:
            own = local_shape(own, part, rank)
        out = torch.empty(own, dtype=TORCH_DTYPES[source.entry(name).dtype])
        targets: list[Target] = []
        for region, at in regions_of(cuts, shape, owned=False):
            view = out
            for dim, (start, length) in enumerate(zip(at, region.sizes, strict=True)):
                view = view.narrow(dim, start, length)
            targets.append(Target(name=name, global_shape=shape, region=region, out=view))
        load_into(source, targets)
        return out

    def _heads(self) -> tuple[str, ...]:
        """Parameters outside of a transformers model's base that are not saved, or in another shape; none where of the
        base itself one is missing."""
        base = f"{getattr(self._model, 'base_model_prefix', '')}."
        names = [name for name, _ in self._model.named_parameters()]
        if not any(name.startswith(base) for name in names):  # no transformers model, or one without a head
            return ()
        known = [name for name in names if name in self._saved or name in self._merges]
        if any(name.startswith(base) and name not in known for name in names):
            return ()
        return tuple(name for name in names if not name.startswith(base) and not self._fits(name))

    def _fits(self, name: str) -> bool:
        if name in self._merges:
            return True
        saved = self._saved.get(name)
        return saved is not None and tuple(self._source.entry(saved).global_shape) == self._shapes[name]

    def _whole(self, source: Source, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        return load_slices(source, {name: TensorSlice.whole(shape)}, global_shapes={name: shape})[name]

    def _merged(self, name: str, merge: Merge, cuts: Cuts) -> torch.Tensor:
        """A tensor that is saved in pieces. Where it is a list that is divided (experts), only its own are read."""
        for part, rank in cuts:
            ranges = part.ranges[rank]
            start, stop = ranges[0]
            if part.dim or len(ranges) > 1 or part.size != self._shapes[name][0]:
                continue
            own = merge.of_members(start, stop, part.size)
            made = None if own is None else self._make(own)[name]
            if made is not None and tuple(made.shape) == (stop - start, *self._shapes[name][1:]):
                return _cut(made, [each for each in cuts if each[0] is not part])
        if self._made[0] is not merge:  # q, k and v of one saved tensor are asked for one after another
            self._made = (merge, self._make(merge))
        whole = self._made[1][name]
        if tuple(whole.shape) != self._shapes[name]:
            raise CheckpointError(
                f"{name} is made of {len(merge.sources)} saved tensors such as {merge.sources[0][1]}, which give shape "
                f"{tuple(whole.shape)}, but the model has {self._shapes[name]}; build the model that was saved"
            )
        return _cut(whole, cuts) if cuts else whole.clone()

    def _make(self, merge: Merge) -> dict[str, torch.Tensor]:
        wanted = {saved: TensorSlice.whole(self._source.entry(saved).global_shape) for _, saved in merge.sources}
        return merge.make(load_slices(self._source, wanted), self._model)


def new_values_note(values: object, path: str | None) -> str:
    """Which parameters are not in the folder of initial values, as a further line of a plan; empty where all are."""
    new = values.new if isinstance(values, SavedValues) else ()
    return f"\nnew           {', '.join(new)}: not in {path}, initialised by name" if new else ""


def names_in(source: Source, model: nn.Module) -> dict[str, str]:
    """Name of a parameter or buffer -> its name in the source, for those that it has under one of their own names."""
    tensors = named_tensors(model)
    tied: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        tied.setdefault(id(tensor), []).append(name)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        names = [name, *tied[id(tensor)]]
        for candidate in [*names, *(each.removeprefix(prefix) for each in names)]:
            if candidate in source.manifest.tensors:
                found[name] = candidate
                break
    return found


def _cut(tensor: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    for part, rank in cuts:
        tensor = cut(tensor, part, rank)
    return tensor
