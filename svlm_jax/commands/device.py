"""Whether JAX finds what it is asked to run on."""

import os

from svlm_jax.errors import UserError


def check_device() -> None:
    """Starts JAX. UserError for a platform that is asked for and not there."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        wanted = os.environ.get("JAX_PLATFORMS", "")
        reason = next(iter(str(error).splitlines()), "") or f"none of {wanted}"
        raise UserError(f"JAX finds no device ({reason}): unset JAX_PLATFORMS, or set it to cpu") from error
