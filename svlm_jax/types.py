"""The alphabet of shapes, and the array aliases that signatures use.

    B streams        T new tokens     S slots            L layers
    D width          F MLP width      N query heads      K key-value heads
    G = N / K        H head size      V vocabulary       R regions of the cache
    P patches of a grid               C clip tokens      E width of the vision tower
    M max_new_tokens
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Key, UInt8

if TYPE_CHECKING:  # either kind has methods that the other lacks; shapes and types of arrays are checked by the tests, at every call
    Array = Any
else:
    Array = jax.Array | np.ndarray  # what goes into a compiled function may still be on the host
Slot = int | Int[Array, ""]  # a slot of the cache, static or traced
Params = dict[str, Any]  # nested dict of arrays, as `model.qwen_vl` lays them out

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Params", "Slot", "UInt8"]
