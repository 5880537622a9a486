"""Products of a few rows with a weight in eight bits on Hopper, bound by reading the weight once.

The weight's tiles stand in one line, a tile of outputs after the other and in it the tiles of inputs. Every block takes an equal share of the
line, keeps `STAGES` tiles in flight, converts each where it has arrived, and multiplies it by the rows' inputs on the tensor cores. Where
the outputs change, it leaves the sums so far; the caller adds up what blocks leave of the same outputs, in an order that is always the same.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from svlm_jax.kernels.ring_attention.mosaic_gpu_kernel import ACC, load

INPUTS = OUTPUTS = SIDE = 128  # of a tile
STAGES = 3
HALF = 64  # rows of a tile that are converted at once


@dataclasses.dataclass(frozen=True)
class Shapes:
    """All that is static about one product."""

    rows: int  # a multiple of 8, at most 32
    inputs: int  # a multiple of INPUTS
    outputs: int  # a multiple of OUTPUTS
    blocks: int
    stored: jnp.dtype  # of the weight
    dtype: jnp.dtype  # of what it is multiplied by
    turned: bool = False  # the weight is [outputs, inputs]

    @property
    def tall(self) -> int:
        """Tiles of one tile of outputs."""
        return self.inputs // INPUTS

    @property
    def tiles(self) -> int:
        return self.tall * (self.outputs // OUTPUTS)

    def share(self, block):
        """The first tile of a block's share (a number or traced), and the one behind its last."""
        return block * self.tiles // self.blocks, (block + 1) * self.tiles // self.blocks

    @property
    def parts(self) -> int:
        """Tiles of outputs that one share may touch."""
        return max((stop - 1) // self.tall - start // self.tall + 1 for start, stop in map(self.share, range(self.blocks)))


def _multiply(shapes: Shapes, x_ref, weight_ref, sums_ref, x_smem, weight_smem, wide_smem, out_smem, ready):
    block = lax.axis_index("block")
    start, stop = (lax.div(each * shapes.tiles, jnp.int32(shapes.blocks)) for each in (block, block + 1))
    tall = jnp.int32(shapes.tall)

    def fetch(tile):
        slot = lax.rem(tile - start, jnp.int32(STAGES))
        inputs, outputs = pl.ds(lax.rem(tile, tall) * INPUTS, INPUTS), pl.ds(lax.div(tile, tall) * OUTPUTS, OUTPUTS)
        tile_of = (outputs, inputs) if shapes.turned else (inputs, outputs)
        plgpu.copy_gmem_to_smem(weight_ref.at[tile_of], weight_smem.at[slot], ready.at[slot])
        plgpu.copy_gmem_to_smem(x_ref.at[:, inputs], x_smem.at[slot], ready.at[slot])

    for ahead in range(STAGES):
        pl.when(start + ahead < stop)(functools.partial(fetch, start + ahead))
    first = lax.div(start, tall)

    def part(index, _):
        """The share's tiles of one tile of outputs."""
        begin = jnp.maximum(start, (first + index) * shapes.tall)
        end = jnp.minimum(stop, (first + index + 1) * shapes.tall)

        def summed(acc):
            def step(tile, _):
                slot = lax.rem(tile - start, jnp.int32(STAGES))
                plgpu.barrier_wait(ready.at[slot])
                for top in range(0, SIDE, HALF):  # registers hold no more
                    half = pl.ds(top, HALF)
                    wide_smem[half] = _wide(load(weight_smem.at[slot, half], plgpu.Layout.WGMMA_UPCAST_2X), shapes.dtype)
                plgpu.commit_smem()
                plgpu.wgmma(acc, wide_smem if shapes.turned else wide_smem.transpose((1, 0)), x_smem.at[slot].transpose((1, 0)))
                plgpu.wgmma_wait(0)
                pl.when(tile + STAGES < stop)(lambda: fetch(tile + STAGES))
                return ()

            lax.fori_loop(begin, end, step, ())
            return acc[...]

        out_smem[...] = pl.run_scoped(summed, ACC((OUTPUTS, shapes.rows), jnp.float32))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, sums_ref.at[block, index])
        plgpu.wait_smem_to_gmem(0)
        return ()

    lax.fori_loop(0, lax.div(stop - 1, tall) - first + 1, part, ())


def _wide(tile, dtype):
    """Exact: bfloat16 holds every number of either kind."""
    if tile.dtype == jnp.int8:
        return tile.astype(dtype)
    placed = placed_bits(lax.bitcast_convert_type(tile, jnp.int8).astype(jnp.int16))
    return lax.bitcast_convert_type(placed, dtype) * jnp.asarray(BIASES, dtype)  # PTX's product of bfloat16 keeps subnormal numbers


BIASES = 2.0**120  # what the biases of the exponents of bfloat16 and float8_e4m3fn differ by


def placed_bits(bits):
    """The sign, 4 bits of exponent and 3 of fraction of a float8_e4m3fn, given with its sign in all upper bits [int16], at their places in a
    bfloat16, which is then the number over `BIASES`. The conversions that the chip has take longer than the weight takes to arrive."""
    return (bits << 4) & jnp.int16(0x87F0 - 0x10000)


@functools.partial(jax.jit, static_argnames="shapes")
def multiply(shapes: Shapes, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Launches the kernel.

    Args:
      x: [rows, inputs].
      weight: int8 or float8_e4m3fn [inputs, outputs], or the other way round.

    Returns:
      float32 [blocks, parts, OUTPUTS, rows]: what each block found of the outputs that its share touches, one tile of them after the
      other; what lies behind the last one is not written.
    """
    wide = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    narrow = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))

    def body(*refs):
        _multiply(shapes, *refs)

    launch = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((shapes.blocks, shapes.parts, OUTPUTS, shapes.rows), jnp.float32),
        scratch_types=[
            plgpu.SMEM((STAGES, shapes.rows, INPUTS), shapes.dtype, transforms=wide),
            plgpu.SMEM((STAGES, SIDE, SIDE), shapes.stored, transforms=narrow),
            plgpu.SMEM((SIDE, SIDE), shapes.dtype, transforms=wide),
            plgpu.SMEM((OUTPUTS, shapes.rows), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ],
        grid=(shapes.blocks,),
        grid_names=("block",),
    )
    return launch(x, weight)
