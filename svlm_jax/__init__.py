"""StreamingVLM in JAX: a vision-language model that comments on video without end, at constant memory and time a round.

    import svlm_jax
    model = svlm_jax.load()  # the bundled one, or a Hugging Face directory
    for caption in svlm_jax.stream("match.mp4", model, temperature=0):
        print(caption.start, caption.end, caption.text)

Importing this package imports nothing else: what is named here is loaded when it is first asked for.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svlm_jax.api import Commentary as Commentary
    from svlm_jax.api import load as load
    from svlm_jax.api import stream as stream
    from svlm_jax.captions import Caption as Caption
    from svlm_jax.config import StreamConfig as StreamConfig
    from svlm_jax.errors import UserError as UserError
    from svlm_jax.generate import generate as generate
    from svlm_jax.streaming.state import init_state as init_state
    from svlm_jax.streaming.step import decode as decode
    from svlm_jax.streaming.step import ingest as ingest
    from svlm_jax.streaming.step import open_stream as open_stream

_HOMES = {
    "Caption": "svlm_jax.captions",
    "Commentary": "svlm_jax.api",
    "StreamConfig": "svlm_jax.config",
    "UserError": "svlm_jax.errors",
    "decode": "svlm_jax.streaming.step",
    "generate": "svlm_jax.generate",
    "ingest": "svlm_jax.streaming.step",
    "init_state": "svlm_jax.streaming.state",
    "load": "svlm_jax.api",
    "open_stream": "svlm_jax.streaming.step",
    "stream": "svlm_jax.api",
}
__all__ = [
    "Caption",
    "Commentary",
    "StreamConfig",
    "UserError",
    "decode",
    "generate",
    "ingest",
    "init_state",
    "load",
    "open_stream",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'svlm_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing svlm_jax.generate, the module, must not put it in the place of svlm_jax.generate, the function.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
