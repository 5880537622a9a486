"""Whether JAX finds what it is asked to run on, and the mesh of it."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from svlm_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh


def check_device() -> None:
    """Starts JAX. UserError for a platform that is asked for and not there."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        wanted = os.environ.get("JAX_PLATFORMS", "")
        reason = next(iter(str(error).splitlines()), "") or f"none of {wanted}"
        raise UserError(f"JAX finds no device ({reason}): unset JAX_PLATFORMS, or set it to cpu") from error


def mesh_of_flag(sizes: Mapping[str, int] | None) -> "Mesh | None":
    """The devices of `--mesh`; None for one device. UserError where there are too few."""
    if sizes is None or all(size == 1 for size in sizes.values()):
        return None
    from svlm_jax.sharding import make_mesh

    return make_mesh(data=sizes["data"], tensor=sizes["tensor"])
