"""Tests run on the CPU unless JAX_PLATFORMS says otherwise, and with every shape and type of the package's signatures checked."""

import os
from pathlib import Path

import jaxtyping

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's remarks on how long it compiles

ROOT = Path(__file__).parent.parent
UNCHECKED = {"svlm_jax.streaming.state"}  # its dataclasses are pytrees, which hold shapes, shardings and tracers as well as arrays


def checked_modules() -> list[str]:
    files = [f for top in ("svlm_jax", "configs", "kernels") for f in (ROOT / top).rglob("*.py") if f.name != "__init__.py"]
    names = (".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files)
    return sorted({name if name.startswith("svlm_jax.") else f"svlm_jax.{name}" for name in names} - UNCHECKED)


jaxtyping.install_import_hook(checked_modules(), "typecheck.checked")
