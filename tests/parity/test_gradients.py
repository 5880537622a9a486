"""Gradients of our packed training step against PyTorch's through transformers, chunk by chunk, on a random model. Needs PyTorch."""

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of huggingface_hub
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent.parent))  # helpers of all tests

import packed  # noqa: E402
import test_transformers as forward_tests  # noqa: E402

from svlm_jax.checkpoints.hub_config import read_config  # noqa: E402
from svlm_jax.checkpoints.load import load_params  # noqa: E402
from svlm_jax.data.batch import IGNORED  # noqa: E402
from svlm_jax.model.vision import patchify  # noqa: E402
from svlm_jax.sharding import make_mesh  # noqa: E402
from svlm_jax.training.attention import Job, choose  # noqa: E402
from svlm_jax.training.forward import Recipe  # noqa: E402
from svlm_jax.training.placement import Placement  # noqa: E402
from svlm_jax.training.step import StepConfig, Trainer  # noqa: E402
from svlm_jax.training.trainable import flatten  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # the other libraries' warnings are theirs

PAD = 1  # of clips, in `packed`


def chunks_of(side: int) -> list[packed.Chunk]:
    """Clips whose tokens cover side x side pixels."""
    return [
        packed.chunk(5, (4, 3 * side, 5 * side), 8, seed=0, side=side),
        packed.chunk(3, (2, 5 * side, 6 * side), 6, (1, 2 * side, 3 * side), 4, seed=1, side=side),
        packed.chunk(9, seed=2, side=side),
    ]


def their_loss(model, config, chunk: packed.Chunk):
    """The sum over a chunk's labelled tokens."""
    inputs = {}
    if chunk.clips:
        clips = [np.asarray(patchify(config.vision, jnp.asarray(clip[None]))).reshape(-1, config.vision.patch_features) for clip in chunk.clips]
        side = config.vision.patch_size
        inputs["pixel_values_videos"] = torch.from_numpy(np.concatenate(clips))
        inputs["video_grid_thw"] = torch.tensor([(-(-len(c) // 2), c.shape[2] // side, c.shape[3] // side) for c in chunk.clips])
    logits = model(
        input_ids=torch.from_numpy(chunk.tokens.astype(np.int64))[None],
        attention_mask=torch.ones(1, len(chunk.tokens), dtype=torch.long),
        position_ids=torch.from_numpy(chunk.positions.astype(np.int64)).T[:, None],
        use_cache=False,
        **inputs,
    ).logits[0]
    labels = torch.from_numpy(chunk.labels.astype(np.int64))[1:]
    return torch.nn.functional.cross_entropy(logits[:-1].float(), labels, ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def test_gradients_of_a_packed_row_are_theirs(tmp_path, family):
    model = forward_tests.theirs(family, tie_word_embeddings=False)
    model.config.video_token_id = PAD
    model.save_pretrained(tmp_path / "weights")
    config = read_config(tmp_path / "weights")
    chunks = chunks_of(config.vision.merged_patch_size)
    count = sum(int((chunk.labels[1:] != IGNORED).sum()) for chunk in chunks)
    loss = sum(their_loss(model, config, chunk) for chunk in chunks) / count
    loss.backward()
    with torch.no_grad():  # written as if they were weights, and read as ours are: the conversion only moves numbers
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(tmp_path / "gradients")
    wanted = flatten(load_params(tmp_path / "gradients", config, stacked=True))

    mesh = make_mesh()
    attention = choose("xla", Job(config, mesh, "cpu", 128, 4, jnp.float32))
    trainer = Trainer(config, StepConfig(frozen=(), dtype="float32", loss_chunk=16), Recipe(attention, Placement(mesh), 1, "gate_up", "full"), 1)
    state = trainer.init(load_params(tmp_path / "weights", config, stacked=True), jax.random.key(0))
    found, sums = jax.jit(trainer.gradients)(state, packed.pack(config, [chunks], tokens=128, bins=2, windows=6))

    np.testing.assert_allclose(float(sums.loss) / count, loss.item(), rtol=1e-5)
    assert set(found) == set(wanted)
    for path, gradient in found.items():
        size = np.linalg.norm(wanted[path])
        assert size > 0, path
        assert np.linalg.norm(np.asarray(gradient) - np.asarray(wanted[path])) < 1e-4 * size, path
