"""What a directory holds, from its config and headers alone: nothing large is read."""

import dataclasses
import math

from svlm_jax.checkpoints.convert import TITLES
from svlm_jax.checkpoints.hub_config import FAMILIES, family_of, read_config
from svlm_jax.checkpoints.load import find
from svlm_jax.checkpoints.orbax_form import array_metadata, is_orbax, leaf_details
from svlm_jax.checkpoints.plan import tensors_of, weight_files
from svlm_jax.checkpoints.run_form import RunSource, described_in, files_of
from svlm_jax.checkpoints.saved_sharding import saved_sharding
from svlm_jax.checkpoints.source import open_source
from svlm_jax.config import ModelConfig
from svlm_jax.errors import UserError
from svlm_jax.model.quantized import Quantization
from svlm_jax.storage import Place, size_of
from svlm_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Inspected:
    """A checkpoint's description."""

    path: Place
    form: str
    family: str
    config: ModelConfig
    parameters: int
    vision_parameters: int
    dtypes: dict[str, int]  # bytes on disk of each dtype
    files: tuple[tuple[str, int], ...]  # name and bytes of the weights' files
    layout: str  # how the arrays are cut into chunks
    sharding: str | None  # how they lay on devices when they were saved, where the form tells
    quantization: Quantization | None
    tokenizer: str


def inspect(path: str | Place) -> Inspected:
    """Describes the checkpoint at `path`. UserError where it is none, or its parts do not belong together."""
    folder, _ = find(path)
    config = read_config(folder)
    opened = open_source(folder, config, dtype="float32")  # of any dtypes: all that is wanted is that every tensor is accounted for
    sizes = {place: math.prod(shape) for place, shape in opened.shapes.items()}
    dtypes: dict[str, int] = {}
    sharding = None
    if is_orbax(folder):
        arrays = array_metadata(folder)
        details, sharding = leaf_details(arrays), saved_sharding(arrays)
        for dtype, _, count in details:
            dtypes[dtype.name] = dtypes.get(dtype.name, 0) + count * dtype.itemsize
        chunked = sum(chunks > 1 for _, chunks, _ in details)
        layout = f"{len(details)} arrays, {chunked} of them in chunks, so that a device reads little more than its shard"
        files = sorted(file for file in (folder / "params").rglob("*") if file.is_file())
    elif isinstance(opened, RunSource):
        for _, shape, dtype in opened.arrays.values():
            dtypes[dtype.name] = dtypes.get(dtype.name, 0) + math.prod(shape) * dtype.itemsize
        sharding = saved_sharding(opened.metadata)
        layout = f"{len(opened.arrays)} arrays, layers stacked, each read by slices"
        files = list(files_of(folder))
    else:
        tensors = tensors_of(folder)
        for stored in tensors.values():
            dtypes[stored.dtype] = dtypes.get(stored.dtype, 0) + stored.nbytes
        layout = f"{len(tensors)} tensors, each read by byte range"
        files = weight_files(folder)
    try:
        words = f"{Tokenizer.load(described_in(folder)).vocab_size:,} tokens"
    except UserError as error:
        words = str(error)
    return Inspected(
        folder,
        TITLES["orbax" if is_orbax(folder) else "run" if isinstance(opened, RunSource) else "hf"],
        FAMILIES[family_of(config)].title,
        config,
        sum(sizes.values()),
        sum(size for place, size in sizes.items() if place[0] == "vision"),
        dtypes,
        tuple((str(file).removeprefix(f"{folder}/"), size_of(file)) for file in files),
        layout,
        sharding,
        opened.quantization,
        words,
    )


def described(found: Inspected) -> list[tuple[str, str]]:
    """The description in lines of (what, text)."""
    v, t, files = found.config.vision, found.config.text, found.files
    windows = "no windows" if v.window_size is None else f"windows of {v.window_size} pixels, whole grid in blocks {list(v.fullatt_block_indexes)}"
    positions = f", {v.position_grid} x {v.position_grid} learned positions" if v.position_grid else ""
    deep = f", DeepStack from blocks {list(v.deepstack_blocks)}" if v.deepstack_blocks else ""
    head = "head tied to the embedding" if t.tie_word_embeddings else "head of its own"
    eight = f"; {', '.join(found.quantization.parts)} in {found.quantization.kind}, and a scale an output" if found.quantization else ""
    return [
        ("family", f"{found.family}, in {found.form}"),
        ("parameters", f"{found.parameters:,}, of them {found.vision_parameters:,} in the vision tower"),
        ("dtypes", ", ".join(f"{name} {size:,} bytes" for name, size in found.dtypes.items()) + eight),
        ("vision", f"{v.depth} blocks of width {v.hidden_size}, {v.num_heads} heads, patches of {v.patch_size}, {windows}{positions}{deep}"),
        ("text", f"{t.num_hidden_layers} layers of width {t.hidden_size}, {t.num_attention_heads} heads, {t.num_key_value_heads} key-value heads"),
        ("vocabulary", f"{t.vocab_size:,} rows, {head}; tokenizer: {found.tokenizer}"),
        ("files", f"{len(files)}, {sum(size for _, size in files):,} bytes, the largest {max(size for _, size in files):,}"),
        ("layout", found.layout),
        *([("sharding", found.sharding)] if found.sharding else []),
    ]
