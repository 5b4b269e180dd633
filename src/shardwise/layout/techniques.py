"""How numbers are kept and sent, whatever the layout: precision, communication, compilation. Values, checked when made.

Knows words and numbers; refuses to know tensors and devices.
"""

from __future__ import annotations

import dataclasses

__all__ = ["Communication", "Precision", "Techniques"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """In which dtypes a step computes. The default is that of the parameters, untouched."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Communication:
    """How tensors travel between ranks. The default sends them as they are."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Techniques:
    """What a run asks for besides its layout; the default asks for nothing."""

    precision: Precision = dataclasses.field(default_factory=Precision)
    communication: Communication = dataclasses.field(default_factory=Communication)
    compile: str = ""  # torch.compile's backend for every unit, such as "inductor" or "aot_eager"; "": not compiled
