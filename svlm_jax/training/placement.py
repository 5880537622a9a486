"""How a training step lies on a mesh: rows cut over data and fsdp, tokens over sequence, weights gathered where they are used."""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from svlm_jax.data.batch import Batch
from svlm_jax.errors import UserError
from svlm_jax.sharding import Axes, Rules, partition
from svlm_jax.types import Array

ROWS = ("data", "fsdp")  # the mesh axes that cut a batch into rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight: Array, whole: NamedSharding, cut: NamedSharding) -> Array:
    """A weight made whole along fsdp. Its gradient is cut again at once: reduced and scattered, not reduced everywhere."""
    return jax.lax.with_sharding_constraint(weight, whole)


_gather.defvjp(
    lambda weight, whole, cut: (jax.lax.with_sharding_constraint(weight, whole), None),
    lambda whole, cut, _, gradient: (jax.lax.with_sharding_constraint(gradient, cut),),
)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the table that says what it cuts."""

    mesh: Mesh | AbstractMesh
    rules: Rules = dataclasses.field(default_factory=Rules)

    @property
    def row_shards(self) -> int:
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def check(self, *, rows: int, tokens: int) -> None:
        """UserError where a micro-batch of `rows` rows of `tokens` tokens does not divide by the mesh."""
        if rows % self.row_shards:
            raise UserError(
                f"{rows} rows a micro-batch do not divide by data x fsdp = {self.mesh.shape['data']} x {self.mesh.shape['fsdp']}: "
                f"make rows a multiple of {self.row_shards}, accumulate less, or move devices to another mesh axis"
            )
        sequence = self.mesh.shape["sequence"]
        if tokens % sequence:
            raise UserError(f"rows of {tokens} tokens do not divide by sequence = {sequence}: choose tokens a row that do")

    def sharding(self, *axes: str | tuple[str, ...] | None) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))  # type: ignore[arg-type]  (an abstract mesh will do for tracing)

    def rows(self, x: Array, second: str | None = "sequence") -> Array:
        """[B, T, ...] with rows and tokens on their shards; an axis that does not divide stays whole."""
        cut = second if second is not None and x.shape[1] % self.mesh.shape[second] == 0 else None
        return jax.lax.with_sharding_constraint(x, self.sharding(ROWS, cut))

    def bins(self, x: Array, *, count: int) -> Array:
        """[B * G, ...] bins of patches, G = `count` a row: over the rows' shards, and over sequence where G divides by it."""
        cut = (*ROWS, "sequence") if count % self.mesh.shape["sequence"] == 0 else ROWS
        return jax.lax.with_sharding_constraint(x, self.sharding(cut))

    def batch(self, batch: Batch) -> Batch:
        """The shardings of a batch, as a Batch of them: tokens, and bins of patches, are cut by sequence where they divide."""

        def place(array: Array) -> NamedSharding:
            return self.sharding(ROWS, "sequence" if array.shape[1] % self.mesh.shape["sequence"] == 0 else None)

        return jax.tree.map(place, batch)

    def weight(self, shape: tuple[int, ...], axes: Axes) -> NamedSharding:
        """Where a weight of these logical axes is kept."""
        return NamedSharding(self.mesh, partition(shape, axes, self.mesh, self.rules))  # type: ignore[arg-type]

    def gather(self, weights: Any, axes: Any) -> Any:
        """Weights as a product wants them: whole along fsdp, still cut by tensor. `axes` is a tree of logical axes like `weights`."""

        def whole(weight: Array, names: Axes) -> Array:
            cut = self.weight(weight.shape, names)
            if "fsdp" not in cut.spec:
                return weight
            spec = PartitionSpec(*(None if axis == "fsdp" else axis for axis in cut.spec))
            return _gather(weight, NamedSharding(cut.mesh, spec), cut)

        return jax.tree.map(whole, weights, axes)
