"""The alphabet of shapes, and the array aliases that signatures use.

    B streams        T new tokens     S slots            L layers
    D width          F MLP width      N query heads      K key-value heads
    G = N / K        H head size      V vocabulary       R regions of the cache
    P patches of a grid               C clip tokens      E width of the vision tower
    M max_new_tokens
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Key, UInt8

Array = jax.Array | np.ndarray  # what goes into a compiled function may still be on the host
Slot = int | Int[Array, ""]  # a slot of the cache, static or traced
Params = dict[str, Any]  # nested dict of arrays, as `model.qwen_vl` lays them out

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Params", "Slot", "UInt8"]
