"""How numbers are kept and sent, whatever the layout: precision, communication, compilation. Values, checked when made.

Knows words and numbers; refuses to know tensors and devices.
"""

from __future__ import annotations

import dataclasses
import math

from shardwise.errors import ConfigError

__all__ = ["Communication", "Precision", "Techniques"]


SYNCHRONISED = "synchronised"  # BatchNorm: the micro-batches of all replicas together


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """In which dtypes a step computes. The default is that of the parameters, untouched. Raises `ConfigError`.

    compute: "float32", "bfloat16", "float16" or "float8" (linear layers by torchao, all else in bfloat16). Optimizers
        update float32 masters of what is held in 16 bits (Micikevicius et al. 2018, arXiv:1710.03740), and gradients
        are accumulated in float32.
    reduce: in which dtype gradients travel when replicas sum them, as `Communication.gradients` says it too.
    emulate: parameters and activations stay in float32; operands and results of products are rounded to `compute`.
    loss_scale: "dynamic", "none" or a number, by which the loss is multiplied for the backward; None: dynamic for
        float16, else none. `loss_scale_window` good steps double a dynamic one, an overflow halves it.
    logits: "float32": what the head returns is made float32, and the loss computed in it; "compute": it stays as it is.
    keep: what stays in float32, its inputs and outputs cast: "norms", "routers", or names of modules, `*` for any part.
    deterministic: only algorithms that give the same bits in every run.
    """

    compute: str = "float32"
    reduce: str = "float32"
    emulate: bool = False
    loss_scale: str | float | None = None
    loss_scale_window: int = 2000
    logits: str = "float32"
    keep: tuple[str, ...] = ("norms", "routers")
    deterministic: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))
        _one_of("compute", self.compute, ("float32", "bfloat16", "float16", "float8"))
        _one_of("reduce", self.reduce, ("float32", "bfloat16", "float16"))
        _one_of("logits", self.logits, ("compute", "float32"))
        if self.emulate and self.compute not in ("bfloat16", "float16"):
            raise ConfigError(
                f'emulate rounds to 16 bits, but compute = "{self.compute}"; use compute = "bfloat16" or "float16"'
            )
        scale = self.loss_scale
        if isinstance(scale, str):
            _one_of("loss_scale", scale, ("dynamic", "none"))
        elif scale is not None and not (0 < scale < math.inf):
            raise ConfigError(f'a loss scale is a positive number, "dynamic" or "none", but got {scale}; use 65536')
        if self.loss_scale_window < 1:
            raise ConfigError(f"loss_scale_window counts good steps, but got {self.loss_scale_window}; use 2000")

    @property
    def is_narrow(self) -> bool:
        """Whether parameters and activations are held in 16 bits, and masters of them besides."""
        return self.compute != "float32" and not self.emulate

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled for the backward."""
        return self.compute == "float16" if self.loss_scale is None else self.loss_scale != "none"

    @property
    def scale_is_dynamic(self) -> bool:
        return self.scales_loss and not isinstance(self.loss_scale, int | float)

    @property
    def label(self) -> str:
        """One phrase for headers and notes; "" where nothing is asked for."""
        if self.compute == "float32":
            return "deterministic" if self.deterministic else ""
        said = f"emulated {self.compute} (operands and results of products rounded, multiplied in float32)"
        text = said if self.emulate else f"{self.compute} with float32 masters"
        return text + (", deterministic" if self.deterministic else "")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Communication:
    """How tensors travel between ranks. The default sends them as they are. Raises `ConfigError`.

    gradients: sums over replicas: "none", "bf16", "fp16", "int8" (blocks), "powersgd:R" (matrices of rank R) or
        "topk:F" (the fraction F that is largest); the last three feed back what they leave out.
    activations: what crosses between stages: "none", "bf16", "fp16" or "int8".
    algorithm: of sums of gradients: "auto" (shared memory on one host, else what the backend does), "ring", "tree"
        or "hierarchical" (inside each host, then between hosts).
    """

    gradients: str = "none"
    activations: str = "none"
    algorithm: str = "auto"

    def __post_init__(self) -> None:
        _one_of("algorithm", self.algorithm, ("auto", "ring", "tree", "hierarchical"))
        _one_of("activations", self.activations, ("none", "bf16", "fp16", "int8"))
        name, colon, number = self.gradients.partition(":")
        if name == "powersgd" and number.isdecimal() and int(number) > 0:
            return
        if name == "topk" and _is_fraction(number):
            return
        if colon or name not in ("none", "bf16", "fp16", "int8"):
            raise ConfigError(
                f'gradients = "{self.gradients}" is no compression; use "none", "bf16", "fp16", "int8", "powersgd:4" '
                '(a rank of 1 or more) or "topk:0.01" (a fraction above 0, at most 1)'
            )

    @property
    def gradient_code(self) -> tuple[str, float]:
        """The name of the compression of gradients, and its number, if it has one."""
        name, _, number = self.gradients.partition(":")
        return name, float(number or 0)

    @property
    def exact(self) -> Communication:
        """The same without what rounds tensors on their way."""
        return Communication(algorithm=self.algorithm)

    @property
    def feeds_back(self) -> bool:
        """Whether what is left out of a step's gradients is added to the next one's."""
        return self.gradient_code[0] in ("int8", "powersgd", "topk")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Techniques:
    """What a run asks for besides its layout; the default asks for nothing."""

    precision: Precision = dataclasses.field(default_factory=Precision)
    communication: Communication = dataclasses.field(default_factory=Communication)
    batch_norm: str = "own"  # or SYNCHRONISED: what a micro-batch is normalised with on several replicas
    compile: str = ""  # torch.compile's backend for every unit, such as "inductor" or "aot_eager"; "": not compiled

    def __post_init__(self) -> None:
        _one_of("batch_norm", self.batch_norm, ("own", SYNCHRONISED))
        if self.batch_norm == SYNCHRONISED and self.compile:
            raise ConfigError(
                f'replicas sum statistics inside of units, but compile = "{self.compile}" makes graphs of them; drop '
                'compile, or batch_norm = "synchronised"'
            )
        wire = {"float32": "none", "bfloat16": "bf16", "float16": "fp16"}[self.precision.reduce]
        if wire != "none" and self.communication.gradients not in ("none", wire):
            raise ConfigError(
                f'gradients are summed in one way, but reduce = "{self.precision.reduce}" and gradients = '
                f'"{self.communication.gradients}"; drop one'
            )
        if wire != "none":
            communication = dataclasses.replace(self.communication, gradients=wire)
            object.__setattr__(self, "communication", communication)
        if self.communication.feeds_back and self.precision.scale_is_dynamic:
            raise ConfigError(
                f'what gradients = "{self.communication.gradients}" leaves out of one step is added to the next, but a '
                "dynamic loss scale changes in between; give loss_scale a number, or send gradients as bf16"
            )


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r:.200} is not one of {', '.join(known)}; use one of these")


def _is_fraction(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False
