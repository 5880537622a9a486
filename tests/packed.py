"""Packed batches of random chunks, made the slow and obvious way, and the same chunks unpacked."""

import dataclasses
from fractions import Fraction

import numpy as np

from svlm_jax.config import ModelConfig
from svlm_jax.data.batch import IGNORED, PADDING, Batch
from svlm_jax.model.rope import clip_extent, clip_offsets
from svlm_jax.model.vision import window_order


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Words, clips and words: what `model.qwen_vl.forward` takes."""

    tokens: np.ndarray  # [T]
    labels: np.ndarray  # [T]
    positions: np.ndarray  # [T, 3]
    places: np.ndarray  # [C]
    clips: tuple[np.ndarray, ...]  # uint8 [F, 3, height, width] each


def chunk(*parts: int | tuple[int, int, int], seed: int, unit: int = 1, vocabulary: int = 256, side: int = 28) -> Chunk:
    """Parts are counts of random words (the last half of them labelled), or (frames, height, width) of a clip in pixels.

    A token covers side x side of them.
    """
    rng = np.random.default_rng(seed)
    tokens, labels, positions, places, clips, end = [], [], [], [], [], 0
    for part in parts:
        if isinstance(part, int):
            words = rng.integers(3, vocabulary, part)
            labels.extend(np.where(np.arange(part) < part // 2, IGNORED, words))
            positions.append(np.repeat(end + np.arange(part)[:, None] * unit, 3, 1))
            tokens.extend(words)
            end += part * unit
            continue
        frames, height, width = part
        clips.append(rng.integers(0, 256, (frames, 3, height, width), dtype=np.uint8))
        grid = (-(-frames // 2), height // side, width // side)
        places.extend(range(len(tokens), len(tokens) + int(np.prod(grid))))
        tokens.extend([1] * int(np.prod(grid)))
        labels.extend([IGNORED] * int(np.prod(grid)))
        positions.append(end + clip_offsets(grid, Fraction(2), unit))
        end += clip_extent(grid, Fraction(2), unit)
    arrays = (np.asarray(tokens), np.asarray(labels), np.concatenate(positions), np.asarray(places))
    return Chunk(*(a.astype(np.int32) for a in arrays), tuple(clips))


def _grids(config: ModelConfig, clip: np.ndarray):
    """Each pair of frames in windows: (patches, coordinates, valid, merged token in each place or -1)."""
    c, (frames, _, height, width) = config.vision, clip.shape
    if frames % 2:
        clip = np.concatenate([clip, clip[-1:]])
    order, side = window_order(c, height, width), c.patch_size
    pair = clip.reshape(-1, 2, 3, height // side, side, width // side, side).transpose(0, 3, 5, 1, 4, 6, 2)
    row, column = np.meshgrid(np.arange(height // side), np.arange(width // side), indexing="ij")

    def processor_order(a):
        rest = a.shape[2:]
        a = a.reshape(height // side // 2, 2, width // side // 2, 2, *rest).swapaxes(1, 2)
        return a.reshape(-1, *rest)[order.source]

    def windows(a, fill=0):
        """[patches or tokens, ...] in the tower's windows, or in a batch's where it has none."""
        if c.window_size is not None:
            return a.reshape(order.windows, len(a) // order.windows, *a.shape[1:])
        size = window_patches(config) * len(a) // order.valid.size
        full = np.full((-(-len(a) // size) * size, *a.shape[1:]), fill, a.dtype)
        full[: len(a)] = a
        return full.reshape(-1, size, *a.shape[1:])

    token = np.full(order.valid.size // 4, -1)
    token[order.restore] = np.arange(len(order.restore))
    for grid in pair:
        patches = processor_order(grid.reshape(height // side, width // side, -1))
        yield windows(patches), windows(processor_order(np.stack([row, column], -1))), windows(order.valid.reshape(-1)), windows(token, -1)


def window_patches(config: ModelConfig) -> int:
    """Patches of a window; 16 tokens of four each where the tower has none."""
    c = config.vision
    return 64 if c.window_size is None else (c.window_size // c.patch_size) ** 2


def pack(config: ModelConfig, rows: list[list[Chunk]], *, tokens: int, bins: int, windows: int) -> Batch:
    """Rows of chunks, one after the other; grids go into the first bin of their row with room."""
    c = config.vision
    p = window_patches(config)
    shape = (len(rows), bins, windows, p)
    out = Batch(
        tokens=np.zeros((len(rows), tokens), np.int32),
        labels=np.full((len(rows), tokens), IGNORED, np.int32),
        positions=np.zeros((len(rows), tokens, 3), np.int32),
        segments=np.full((len(rows), tokens), PADDING, np.int32),
        patches=np.zeros((*shape, c.patch_features), np.uint8),
        patch_coordinates=np.zeros((*shape, 2), np.int32),
        patch_valid=np.zeros(shape, bool),
        grids=np.full(shape[:3], PADDING, np.int32),
        places=np.full((*shape[:3], p // 4), tokens, np.int32),
    )
    for r, chunks in enumerate(rows):
        start, used, numbers = 0, [0] * bins, [0] * bins
        for number, chunk in enumerate(chunks, 1):
            span = slice(start, start + len(chunk.tokens))
            out.tokens[r, span], out.labels[r, span], out.positions[r, span] = chunk.tokens, chunk.labels, chunk.positions
            out.segments[r, span] = number
            places = iter(np.split(chunk.places, np.flatnonzero(np.diff(chunk.places) > 1) + 1))
            for clip in chunk.clips:
                mine, done = next(places), 0
                for patches, coordinates, valid, token in _grids(config, clip):
                    g = next(g for g in range(bins) if used[g] + len(valid) <= windows)
                    into = (r, g, slice(used[g], used[g] + len(valid)))
                    used[g], numbers[g] = used[g] + len(valid), numbers[g] + 1
                    out.patches[into], out.patch_coordinates[into], out.patch_valid[into] = patches, coordinates, valid
                    out.grids[into] = numbers[g]
                    out.places[into] = np.where(token >= 0, start + mine[np.maximum(token, 0) + done], tokens)
                    done += int((token >= 0).sum())
            start += len(chunk.tokens)
    return out
