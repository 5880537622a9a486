"""Tests run on the CPU unless JAX_PLATFORMS says otherwise, and with every shape and type of the package's signatures checked."""

import gc
import os
import shutil
import signal
import tempfile
from pathlib import Path

import jaxlib.version
import jaxtyping
import pytest

ROOT = Path(__file__).parent.parent
UNCHECKED = {
    # Their dataclasses are pytrees, which hold shapes, shardings and tracers as well as arrays
    "svlm_jax.streaming.state",
    "svlm_jax.streaming.plan",
    "svlm_jax.data.batch",
    "svlm_jax.training.loss",
    "svlm_jax.training.step",
    "svlm_jax.generate",  # its Model is a protocol that cannot be checked while running
    "svlm_jax.terminal",  # no arrays; pytest's capture is not a typing.TextIO
}


def checked_modules() -> list[str]:
    files = [f for top in ("svlm_jax", "configs", "kernels") for f in (ROOT / top).rglob("*.py") if f.name != "__init__.py"]
    names = (".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files)
    return sorted({name if name.startswith("svlm_jax.") else f"svlm_jax.{name}" for name in names} - UNCHECKED)


signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C, and what tests start would too
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's remarks on how long it compiles
# XLA leaves out what takes longer than tests run their programs: models are tiny, and a program is called a few times.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if jaxlib.version.__version_info__[:2] == (0, 10):  # a later XLA has one way to emit what it fuses, the one that takes longer
    os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}".strip()
# Programs that the command line compiles are kept for this run, by all workers together, and not in the user's cache.
_caches = Path(tempfile.gettempdir()) / f"svlm-jax-tests-{os.environ.get('PYTEST_XDIST_TESTRUNUID') or os.getpid()}"
os.environ["XDG_CACHE_HOME"] = str(_caches)
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # gcsfs looks at it when it is imported; the bucket of tests is of one kind
jaxtyping.install_import_hook(checked_modules(), "typecheck.checked")


MOST_MAPPINGS = 30_000  # of memory, of the 65,530 that Linux allows a process: each compiled program takes some, and without room XLA crashes


@pytest.fixture(autouse=True)
def _forget_programs():
    """Lets go of compiled programs where there are many."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()


def pytest_sessionfinish(session):
    uid = getattr(session.config, "workerinput", {}).get("testrunuid")
    if uid is None:  # the only process, or the one that started the workers, which have ended by now
        plugin = session.config.pluginmanager.get_plugin("dsession")
        uid = getattr(getattr(plugin, "nodemanager", None), "testrunuid", None) or os.getpid()
        shutil.rmtree(_caches.with_name(f"svlm-jax-tests-{uid}"), ignore_errors=True)
