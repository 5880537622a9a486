"""How far a product is off with float8_e4m3fn on one side or both, at 7B sizes with outlier channels: emulated with NumPy.

    python benchmarks/fp8_error.py
"""

import ml_dtypes
import numpy as np

SIZES = {"qkv": (3584, 4608), "down": (18944, 3584), "vision gate_up": (1280, 6840)}  # inputs, outputs
ROWS, OUTLIERS, TIMES = 64, (8, 16), 50  # inputs and outputs that are so many times as large as the others


def rounded(a: np.ndarray, axis: int) -> np.ndarray:
    """What is left of `a` [m, n] in eight bits, with one scale for all numbers along `axis`."""
    scale = np.abs(a).max(axis, keepdims=True) / float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
    return (a / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


def main() -> None:
    rng = np.random.default_rng(0)
    for name, (inputs, outputs) in SIZES.items():
        weight = 0.02 * rng.standard_normal((inputs, outputs), np.float32)
        weight[:, rng.choice(outputs, OUTLIERS[1], replace=False)] *= TIMES
        small = rounded(weight, 0)
        for large in (False, True):
            x = rng.standard_normal((ROWS, inputs), np.float32)
            x[:, rng.choice(inputs, OUTLIERS[0], replace=False)] *= TIMES if large else 1
            x = x.astype(ml_dtypes.bfloat16).astype(np.float32)
            exact = x @ weight
            one, both = (float(np.linalg.norm(y - exact) / np.linalg.norm(exact)) for y in (x @ small, rounded(x, 1) @ small))
            print(f"{name:<15} {'outlier inputs' if large else 'plain inputs':<15} weights alone {one:.2%}, both sides {both:.2%}")


if __name__ == "__main__":
    main()
