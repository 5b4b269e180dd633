"""The tables of a run file that say how numbers are kept and sent: precision, communication, asynchronous."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from shardwise.comm.mpi_algorithms import open_mpi_parameters
from shardwise.layout import Communication, Precision
from shardwise.train.run_tables import Table

__all__ = ["AsynchronousOptions", "CommunicationOptions", "PrecisionOptions"]


class PrecisionOptions(Table):
    """[precision]: in which dtypes a step computes; the model's own where nothing is said.

    compute             "float32", "bfloat16", "float16", or "float8" where the device has it
    reduce              in which dtype gradients are summed over ranks
    emulate             compute in float32, with operands and results of products rounded to `compute`
    loss_scale          "dynamic", "none" or a number; without it dynamic for float16, else none
    loss_scale_window   steps without an overflow behind which a dynamic one doubles
    logits              "float32": what the head returns is made float32; "compute": it stays as it is
    keep                what stays in float32: "norms", "routers", names of modules
    deterministic       the same bits in every run
    """

    compute: str = "float32"
    reduce: str = "float32"
    emulate: bool = False
    loss_scale: float | int | str | None = None
    loss_scale_window: int = 2000
    logits: str = "float32"
    keep: tuple[str, ...] = ("norms", "routers")
    deterministic: bool = False

    @field_validator("keep", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.value()
        return self

    def value(self) -> Precision:
        """What it says, checked. Raises `ConfigError`."""
        return Precision(**self.model_dump())


class CommunicationOptions(Table):
    """[communication]: how tensors travel between ranks; as they are where nothing is said.

    gradients     their sums over replicas: "none", "bf16", "fp16", "int8", "powersgd:4" (matrices of that rank),
                  "topk:0.01" (that fraction of them)
    activations   what crosses between stages: "none", "bf16", "fp16", "int8"
    algorithm     of sums of gradients: "auto", "ring", "tree", "hierarchical" (inside each host, then between hosts)
    backend       "gloo"; "nccl" on GPUs; "mpi": everything through MPI (mpi4py; ranks of mpirun or srun); "auto"
    same_host     with backend = "mpi", how ranks of one host exchange: "backend", or "shared-memory" past it
    mpi_allreduce, mpi_allgather, mpi_broadcast
                  Open MPI's algorithm: "ring", "rabenseifner", … (docs/launching.md); "auto": what it chooses
    """

    gradients: str = "none"
    activations: str = "none"
    algorithm: str = "auto"
    backend: Literal["auto", "gloo", "nccl", "mpi"] = "auto"
    same_host: Literal["backend", "shared-memory"] = "backend"
    mpi_allreduce: str = "auto"
    mpi_allgather: str = "auto"
    mpi_broadcast: str = "auto"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.value()
        chosen = {"allreduce": self.mpi_allreduce, "allgather": self.mpi_allgather, "bcast": self.mpi_broadcast}
        if open_mpi_parameters(chosen) and self.backend != "mpi":
            raise ValueError(
                f'algorithms of Open MPI are for backend = "mpi", but backend = "{self.backend}"; drop them, or use it'
            )
        return self

    def value(self) -> Communication:
        """What it says of tensors, checked. Raises `ConfigError`."""
        return Communication(gradients=self.gradients, activations=self.activations, algorithm=self.algorithm)


class AsynchronousOptions(Table):
    """[asynchronous]: the replicas of dp are workers, which train by themselves and meet every so many steps.

    method               "local-sgd" (the mean of their weights), "diloco" (an outer optimizer on what they have done),
                         "delayed" (a mean that travels while the next round is computed), "eager-diloco" (both)
    every                steps between two exchanges of a fragment
    outer_learning_rate  of the outer optimizer of diloco and eager-diloco, with outer_momentum and nesterov
    fragments            parts of the parameters that are exchanged one behind the other, each every so many steps
    wire                 how sums travel: "none" (as they are) or what [communication] gradients can be, such as "bf16"
    """

    method: Literal["local-sgd", "diloco", "delayed", "eager-diloco"] = "diloco"
    every: int = Field(default=32, ge=1)
    outer_learning_rate: float = Field(default=0.7, gt=0, allow_inf_nan=False)
    outer_momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = True
    fragments: int = Field(default=1, ge=1)
    wire: str = "none"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        Communication(gradients=self.wire)  # raises ConfigError
        outer = self.model_fields_set & {"outer_learning_rate", "outer_momentum", "nesterov"}
        if outer and not self.method.endswith("diloco"):
            raise ValueError(
                f"{self.method} has no outer optimizer, but {', '.join(sorted(outer))} is given; drop it, or use "
                'method = "diloco"'
            )
        if self.fragments > self.every:
            raise ValueError(
                f"a fragment is exchanged in a step of its own, but there are {self.fragments} and every={self.every}; "
                f"use fragments={self.every} or fewer"
            )
        return self
