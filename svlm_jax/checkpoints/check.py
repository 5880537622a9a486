"""Whether a checkpoint is sound, and whether it is the same as another."""

import dataclasses
import math
from typing import Any

import numpy as np

from svlm_jax.checkpoints.hub_config import FAMILIES, family_of, read_config
from svlm_jax.checkpoints.load import find
from svlm_jax.checkpoints.save import Progress
from svlm_jax.checkpoints.source import Parameters, open_source
from svlm_jax.config import ModelConfig
from svlm_jax.errors import UserError
from svlm_jax.storage import Place
from svlm_jax.types import Params

TOLERANCE = 1e-3  # of a logit in float32
PROMPT_TOKENS = 24
PICTURE = (84, 140)  # pixels


def check(path: str | Place, *, progress: Progress | None = None) -> tuple[ModelConfig, int]:
    """(sizes, number of parameters) of a checkpoint in which every tensor is accounted for and every number finite. Else UserError."""
    folder, _ = find(path)
    config = read_config(folder)
    opened = open_source(folder, config)
    count, done = sum(math.prod(shape) for shape in opened.shapes.values()), 0
    for group in Parameters(opened, config).groups():
        done += sum(array.nbytes for array in group.values())
        if progress is not None:
            progress(done, count * opened.dtype.itemsize)
    return config, count


def compare(path: str | Place, other: str | Place, *, progress: Progress | None = None) -> int:
    """How many numbers the two have that differ in no bit (all of them). UserError names the first tensor that differs."""
    (one, _), (two, _) = find(path), find(other)
    config, theirs = (dataclasses.replace(read_config(folder), name="") for folder in (one, two))
    if config != theirs:
        field = next(
            f"{part}.{name}"
            for part in ("vision", "text")
            for name, value in vars(getattr(config, part)).items()
            if value != getattr(getattr(theirs, part), name)
        )
        raise UserError(f"{one} and {two} are not of one model: {field} differs")
    first, second = open_source(one, config), open_source(two, config)
    if first.dtype != second.dtype:
        raise UserError(f"{one} is {first.dtype.name} and {two} is {second.dtype.name}: convert one of them with --dtype")
    a, b = Parameters(first, config), Parameters(second, config)
    done, total = 0, sum(math.prod(shape) for shape in first.shapes.values()) * first.dtype.itemsize
    for place in a.paths:
        left, right = (np.ascontiguousarray(p.get(place)).reshape(-1).view(f"u{first.dtype.itemsize}") for p in (a, b))
        if not np.array_equal(left, right):
            raise UserError(f"{np.count_nonzero(left != right):,} of {left.size:,} numbers of {a.tensor_of(place)} differ between {one} and {two}")
        done += left.nbytes
        if progress is not None:
            progress(done, total)
    return total // first.dtype.itemsize


def compare_logits(path: str | Place, other: str | Place) -> float | None:
    """The largest difference of a logit between the checkpoint here and `other`, of Hugging Face's form, in transformers; float32.

    The prompt is random tokens and one picture. None where PyTorch or transformers is not installed. UserError beyond `TOLERANCE`.
    """
    try:
        import torch
        import transformers
    except ImportError:
        return None
    import jax

    from svlm_jax.checkpoints.load import load_params
    from svlm_jax.model.qwen_vl import forward
    from svlm_jax.model.vision import patchify

    (folder, _), (theirs, _) = find(path), find(other)
    config = read_config(folder)
    rng = np.random.default_rng(0)
    side = config.vision.merged_patch_size
    height, width = (n // side * side for n in PICTURE)
    frame = rng.integers(0, 256, (1, 1, 3, height, width), dtype=np.uint8)
    pads = height * width // side**2
    model: Any = getattr(transformers, FAMILIES[family_of(config)].architecture).from_pretrained(theirs, dtype=torch.float32).eval()
    image = model.config.image_token_id
    if image >= config.text.vocab_size:
        raise UserError(f"{theirs / 'config.json'} has image_token_id {image}, but the model embeds {config.text.vocab_size}: use its own")
    reserved = [value for name, value in vars(model.config).items() if name.endswith("_token_id") and isinstance(value, int)]
    words = rng.choice(np.setdiff1d(np.arange(config.text.vocab_size), reserved), PROMPT_TOKENS)
    tokens = np.concatenate([words[: PROMPT_TOKENS // 2], np.full(pads, image), words[PROMPT_TOKENS // 2 :]])
    positions = np.repeat(np.arange(len(tokens), dtype=np.int32)[:, None], 3, axis=1)  # both are given the same, so any will do
    places = np.flatnonzero(tokens == image)
    with torch.no_grad():
        wanted = model(
            input_ids=torch.from_numpy(tokens)[None],
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            position_ids=torch.from_numpy(positions.astype(np.int64)).T[:, None],
            pixel_values=torch.from_numpy(np.array(patchify(config.vision, frame)[0])),
            image_grid_thw=torch.tensor([[1, height // config.vision.patch_size, width // config.vision.patch_size]]),
            use_cache=False,
        ).logits[0]
    del model
    params: Params = load_params(folder, config, dtype=np.float32)
    run = jax.jit(lambda p: forward(p, config, tokens[None], positions[None], visuals=(frame,), places=places[None]))
    worst = float(np.abs(np.asarray(run(params))[0] - wanted.numpy()).max())
    if not worst <= TOLERANCE:
        raise UserError(f"a logit of {folder} differs by {worst:.1e} from transformers' of {theirs}: more than {TOLERANCE:.0e}")
    return worst
