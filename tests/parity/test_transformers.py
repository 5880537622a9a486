"""Our forward and our files against transformers' Qwen2_5_VLForConditionalGeneration, on random models. Needs PyTorch.

Positions are ours and handed over, since transformers' own rule has changed between its versions.
"""

import dataclasses
import inspect
import os
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of huggingface_hub
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import load_file  # noqa: E402

from svlm_jax.checkpoints.hub_config import read_config  # noqa: E402
from svlm_jax.checkpoints.load import load, load_params  # noqa: E402
from svlm_jax.checkpoints.save import save_params  # noqa: E402
from svlm_jax.configs.models import tiny  # noqa: E402
from svlm_jax.demo.make_tiny import tiny_path  # noqa: E402
from svlm_jax.model.qwen_vl import forward, init_params  # noqa: E402
from svlm_jax.model.rope import clip_extent, clip_offsets  # noqa: E402
from svlm_jax.model.vision import patchify  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # the other libraries' warnings are theirs

VOCABULARY, IMAGE, VIDEO, START, END = 320, 300, 301, 302, 303
STEP = Fraction(2)  # positions between two grids: 2 a second, and a grid a second
TOLERANCE = 1e-3  # float32, logits of about 1


def theirs(**text) -> "transformers.Qwen2_5_VLForConditionalGeneration":
    """A small random model of transformers'; every bias and norm is random too."""
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **{"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
            **{"num_key_value_heads": 2, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            **{"depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64},
            **{"fullatt_block_indexes": [1, 3], "tokens_per_second": 2},
        },
        **{"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END},
        **text,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name or "ln_q" in name else noise * (0.1 if parameter.ndim == 1 else 0.15))
    return model


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Text, and the frames [F, 3, height, width] of its visuals: one frame is an image, more are a clip."""

    tokens: np.ndarray  # [T]
    positions: np.ndarray  # [T, 3]
    places: np.ndarray  # [C], rows of the pads
    visuals: tuple[np.ndarray, ...]


def prompt(*parts: int | tuple[int, int, int]) -> Prompt:
    """Parts are numbers of random words, or (frames, height, width) of a visual in pixels."""
    rng = np.random.default_rng(0)
    tokens, positions, places, visuals, next_position = [], [], [], [], 0

    def write(ids):
        nonlocal next_position
        tokens.extend(ids)
        positions.extend([(next_position + i,) * 3 for i in range(len(ids))])
        next_position += len(ids)

    for part in parts:
        if isinstance(part, int):
            write(rng.integers(3, 290, part).tolist())
            continue
        frames, height, width = part
        visuals.append(rng.integers(0, 256, (frames, 3, height, width), dtype=np.uint8))
        grid = (-(-frames // 2), height // 28, width // 28)
        write([START])
        count = int(np.prod(grid))
        places.extend(range(len(tokens), len(tokens) + count))
        tokens.extend([IMAGE if frames == 1 else VIDEO] * count)
        positions.extend((next_position + clip_offsets(grid, STEP, 1)).tolist())
        next_position += clip_extent(grid, STEP, 1)
        write([END])
    return Prompt(np.array(tokens), np.array(positions, np.int32), np.array(places, np.int32), tuple(visuals))


PROMPTS = {
    "text": prompt(23),
    "image": prompt(4, (1, 84, 140), 6),
    "clip": prompt(3, (6, 140, 84), 5),
    "odd clip": prompt(3, (5, 112, 112), 5),
    "all": prompt(5, (1, 56, 84), 2, (4, 84, 140), 4, (2, 84, 140), 3),
}


# Unwrapped, because the checked signature gives all visuals of a prompt one size, and "all" mixes sizes.
ours = jax.jit(inspect.unwrap(forward), static_argnums=1)


def our_logits(params, config, p: Prompt) -> np.ndarray:
    visuals = [frames[None] for frames in p.visuals]
    places = p.places[None] if visuals else None
    config = dataclasses.replace(config, name="")  # one compilation for all tests
    return np.asarray(ours(params, config, p.tokens[None], p.positions[None], visuals=visuals, places=places))[0]


def their_logits(model, config, p: Prompt) -> np.ndarray:
    """Pixels go in as patches that transformers' image processor would make of them (`test_pixels_become_their_patches`)."""
    inputs = {}
    for kind, key, several in (("image", "pixel_values", False), ("video", "pixel_values_videos", True)):
        chosen = [frames for frames in p.visuals if (len(frames) > 1) == several]
        if chosen:
            patches = [
                np.asarray(patchify(config.vision, jnp.asarray(frames[None]))).reshape(-1, config.vision.patch_features)
                for frames in chosen
            ]
            inputs[key] = torch.from_numpy(np.concatenate(patches))
            grids = [(-(-len(frames) // 2), frames.shape[2] // 14, frames.shape[3] // 14) for frames in chosen]
            inputs[f"{kind}_grid_thw"] = torch.tensor(grids)
    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(p.tokens)[None],
            attention_mask=torch.ones(1, len(p.tokens), dtype=torch.long),
            position_ids=torch.from_numpy(p.positions.astype(np.int64)).T[:, None],
            use_cache=False,
            **inputs,
        )
    return out.logits[0].float().numpy()


@pytest.fixture(scope="module", params=["untied", "tied"])
def written(request, tmp_path_factory):
    """(their model, the directory that it wrote)."""
    model = theirs(tie_word_embeddings=request.param == "tied")
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder, max_shard_size="400KB")
    return model, folder


@pytest.mark.parametrize("p", PROMPTS.values(), ids=PROMPTS)
def test_their_files_give_their_logits(written, p):
    model, folder = written
    config = read_config(folder)
    params = load_params(folder, config)
    found, wanted = our_logits(params, config, p), their_logits(model, config, p)
    assert wanted.std() > 0.3
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE, rtol=0)


def test_stacked_layers_give_their_logits(written):
    model, folder = written
    config = read_config(folder)
    params = load_params(folder, config, stacked=True)
    np.testing.assert_allclose(
        our_logits(params, config, PROMPTS["all"]), their_logits(model, config, PROMPTS["all"]), atol=TOLERANCE, rtol=0
    )


def test_the_visuals_matter(written):
    """Else the comparisons above would show little."""
    _, folder = written
    config = read_config(folder)
    params, p = load_params(folder, config), PROMPTS["clip"]
    other = dataclasses.replace(p, visuals=(255 - p.visuals[0],))
    assert np.abs(our_logits(params, config, p)[-1] - our_logits(params, config, other)[-1]).max() > 10 * TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_export_keeps_every_byte_and_loads_there(written, tmp_path, dtype):
    model, folder = written
    if dtype == "bfloat16":
        model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
        folder = tmp_path / "half"
        model.save_pretrained(folder)
    config = read_config(folder)
    saved = save_params(load_params(folder, config), config, tmp_path / "ours", shard_bytes=4e5)
    before = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    after = {name: tensor for file in saved.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and before[name].tobytes() == after[name].tobytes() for name in before)
    again, report = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(saved, dtype="auto", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    wanted = dict(model.named_parameters())
    for name, parameter in again.named_parameters():
        assert parameter.dtype == wanted[name].dtype and torch.equal(parameter, wanted[name]), name
    again.config.image_token_id, again.config.video_token_id = IMAGE, VIDEO  # without a tokenizer, Qwen's ids are stated
    if dtype == "float32":
        for p in PROMPTS.values():
            np.testing.assert_allclose(their_logits(again.eval(), config, p), their_logits(model, config, p), atol=1e-5, rtol=0)


def test_a_model_of_ours_gives_its_logits_there(tmp_path):
    config = tiny(VOCABULARY)
    params = jax.tree.map(lambda a: a + 0.05, init_params(config, jax.random.key(0)))  # no bias of 0, no norm of 1
    folder = save_params(params, config, tmp_path / "ours", tokenizer_files_from=None)
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.image_token_id, model.config.video_token_id = IMAGE, VIDEO
    for p in (PROMPTS["text"], PROMPTS["all"]):
        np.testing.assert_allclose(our_logits(params, config, p), their_logits(model, config, p), atol=TOLERANCE, rtol=0)


def test_the_bundled_model_loads_there():
    bundled = load(tiny_path(), dtype=np.float32)
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_path(), dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_path())
    text = "<|im_start|>user\nThe red team shoots 12 times ...<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == bundled.tokenizer.encode(text) and tokenizer.eos_token == "<|im_end|>"
    assert model.config.video_token_id == bundled.tokenizer.special("<|video_pad|>")
    p = Prompt(
        np.array(ids), np.broadcast_to(np.arange(len(ids), dtype=np.int32)[:, None], (len(ids), 3)).copy(), np.zeros(0, np.int32), ()
    )
    np.testing.assert_allclose(
        our_logits(bundled.params, bundled.config, p), their_logits(model, bundled.config, p), atol=TOLERANCE, rtol=0
    )
    assert model.generation_config.eos_token_id[0] == tokenizer.eos_token_id


def test_pixels_become_their_patches():
    """Our patches against their image processor's, which resizes nothing at this size. Their video processor needs torchvision."""
    processing = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    frame = np.random.default_rng(0).integers(0, 256, (3, 84, 140), dtype=np.uint8)
    found = np.asarray(patchify(tiny().vision, jnp.asarray(frame[None, None])))[0]
    processor = processing.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=10**6)
    wanted = processor(images=[frame.transpose(1, 2, 0)], return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
