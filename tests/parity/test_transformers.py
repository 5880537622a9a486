"""Our forward and our files against transformers' models of each family, on random models. Needs PyTorch.

Positions are ours and handed over, since transformers' own rule has changed between its versions.
"""

import dataclasses
import inspect
import os
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of huggingface_hub
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent.parent))  # helpers of all tests

from prompts import END, IMAGE, PARTS, RULES, START, VIDEO, VOCABULARY, Prompt, prompt, prompts  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from svlm_jax.checkpoints.adapters import read_adapter, save_adapter  # noqa: E402
from svlm_jax.checkpoints.convert import convert  # noqa: E402
from svlm_jax.checkpoints.hub_config import family_of, read_config  # noqa: E402
from svlm_jax.checkpoints.load import load, load_params  # noqa: E402
from svlm_jax.checkpoints.save import save_params  # noqa: E402
from svlm_jax.configs.models import tiny, tiny_qwen2_vl, tiny_qwen3_vl  # noqa: E402
from svlm_jax.demo.make_tiny import tiny_path  # noqa: E402
from svlm_jax.model.qwen_vl import forward, init_params  # noqa: E402
from svlm_jax.model.vision import patchify  # noqa: E402
from svlm_jax.streaming.prompt import PromptLayout  # noqa: E402
from svlm_jax.tokenizer import Tokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # the other libraries' warnings are theirs

TOLERANCE = 1e-3  # float32, logits of about 1
CLASSES = {"qwen2_5_vl": "Qwen2_5_VL", "qwen2_vl": "Qwen2VL", "qwen3_vl": "Qwen3VL"}
TOWERS = {
    "qwen2_5_vl": {
        **{"depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64},
        **{"fullatt_block_indexes": [1, 3], "tokens_per_second": 2},
    },
    "qwen2_vl": {"depth": 3, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2},
    "qwen3_vl": {
        **{"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64},
        **{"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2]},
    },
}
DECODERS = {  # what sets the small decoders apart
    "qwen2_5_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
    "qwen2_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
    "qwen3_vl": {
        **{"head_dim": 24, "pad_token_id": None},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 3, 3], "mrope_interleaved": True},
    },
}


def model_class(family: str):
    return getattr(transformers, f"{CLASSES[family]}ForConditionalGeneration")


def theirs(family: str = "qwen2_5_vl", layers: int = 3, **text):
    """A small random model of transformers'; every bias and norm is random too."""
    config = getattr(transformers, f"{CLASSES[family]}Config")(
        text_config={
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": layers,
                "num_attention_heads": 4,
            },
            **{"num_key_value_heads": 2, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2},
            **DECODERS[family],
        },
        vision_config=TOWERS[family],
        **{"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END},
        **text,
    )
    torch.manual_seed(0)
    model = model_class(family)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name or "ln_q" in name else noise * (0.1 if parameter.ndim == 1 else 0.15))
    return model


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
            side = config.vision.patch_size
            grids = [(-(-len(frames) // 2), frames.shape[2] // side, frames.shape[3] // side) for frames in chosen]
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


@pytest.fixture(scope="module", params=[f"{family} {ties}" for family in CLASSES for ties in ("untied", "tied")])
def written(request, tmp_path_factory):
    """(their model, the directory that it wrote, its family)."""
    family, ties = request.param.split()
    model = theirs(family, tie_word_embeddings=ties == "tied")
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder, max_shard_size="400KB")
    return model, folder, family


@pytest.mark.parametrize("name", PARTS)
def test_their_files_give_their_logits(written, name):
    model, folder, family = written
    config, p = read_config(folder), prompts(family)[name]
    assert family_of(config) == family
    params = load_params(folder, config)
    found, wanted = our_logits(params, config, p), their_logits(model, config, p)
    assert wanted.std() > 0.3
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE, rtol=0)


def test_stacked_layers_give_their_logits(written):
    model, folder, family = written
    config, p = read_config(folder), prompts(family)["all"]
    params = load_params(folder, config, stacked=True)
    np.testing.assert_allclose(our_logits(params, config, p), their_logits(model, config, p), atol=TOLERANCE, rtol=0)


def test_the_visuals_matter(written):
    """Else the comparisons above would show little."""
    _, folder, family = written
    config = read_config(folder)
    params, p = load_params(folder, config), prompts(family)["clip"]
    other = dataclasses.replace(p, visuals=(255 - p.visuals[0],))
    assert np.abs(our_logits(params, config, p)[-1] - our_logits(params, config, other)[-1]).max() > 10 * TOLERANCE


@pytest.mark.parametrize("way", ["parameters", "orbax"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_export_keeps_every_byte_and_loads_there(written, tmp_path, dtype, way):
    """From the parameters in memory, and from Orbax's form on disk."""
    model, folder, family = written
    if dtype == "bfloat16":
        model = model_class(family).from_pretrained(folder, dtype=torch.bfloat16)
        folder = tmp_path / "half"
        model.save_pretrained(folder)
    config = read_config(folder)
    if way == "orbax":
        convert(folder, tmp_path / "orbax")
        saved = convert(tmp_path / "orbax", tmp_path / "ours", shard_bytes=4e5).path
    else:
        saved = save_params(load_params(folder, config), config, tmp_path / "ours", shard_bytes=4e5)
    before = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    after = {name: tensor for file in saved.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and before[name].tobytes() == after[name].tobytes() for name in before)
    again, report = model_class(family).from_pretrained(saved, dtype="auto", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    wanted = dict(model.named_parameters())
    for name, parameter in again.named_parameters():
        assert parameter.dtype == wanted[name].dtype and torch.equal(parameter, wanted[name]), name
    again.config.image_token_id, again.config.video_token_id = IMAGE, VIDEO  # without a tokenizer, Qwen's ids are stated
    if dtype == "float32":
        for p in prompts(family).values():
            np.testing.assert_allclose(their_logits(again.eval(), config, p), their_logits(model, config, p), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", CLASSES)
def test_their_positions_of_several_grids_differ_as_said(family):
    """This release resumes text after max(rows, columns), and cuts fractions off; the rule here is the largest position plus one.

    With one grid, and whole steps, both rules say the same; so they do of Qwen3-VL, where every grid is a visual of its own.
    """
    model, rule = theirs(family, layers=1).model, RULES[family]
    step, patch = rule.step, rule.side // 2

    def both(p: Prompt, frames: int, rows: int, columns: int, seconds: float):
        kinds = torch.from_numpy((p.tokens == VIDEO).astype(np.int64) * 2)[None]
        grid = torch.tensor([[-(-frames // 2), rows * rule.side // patch, columns * rule.side // patch]])
        rate = {"second_per_grid_ts": torch.tensor([seconds])} if family == "qwen2_5_vl" else {}
        found, _ = model.get_rope_index(torch.from_numpy(p.tokens)[None], kinds, video_grid_thw=grid, **rate)
        return p.positions, found[:, 0].numpy().T

    ours, found = both(prompt(3, (2, 3, 2), 4, rule=rule), 2, 3, 2, 1.0)
    np.testing.assert_array_equal(ours, found)
    p = prompt(3, (10, 2, 3), 4, rule=rule)
    ours, found = both(p, 10, 2, 3, 1.0)
    if rule.stamp:
        np.testing.assert_array_equal(ours, found)
        return
    after = p.places[-1] + 1
    np.testing.assert_array_equal(ours[:after], found[:after])
    late = int(4 * step) + 1 - max(2, 3)  # five grids of 2 x 3
    np.testing.assert_array_equal(ours[after:] - found[after:], late)
    if family == "qwen2_5_vl":  # a quarter of a second a grid: half a position each
        _, found = both(p, 10, 2, 3, 0.25)
        start = p.positions[p.places[0], 0]
        half = [start + int(grid / 2) for grid in range(5)]
        np.testing.assert_array_equal(found[p.places[::6], 0], half)


def test_their_prompt_of_a_clip_differs_as_said():
    """Their stamps are ours. This release leaves them, and the visuals, between the template's own `<|vision_start|>` and `<|vision_end|>`.

    The model was trained on, and its first release (4.57) writes, what stands between them alone.
    """
    from svlm_jax.data.chat import Clip, lay_out

    processing = pytest.importorskip("transformers.models.qwen3_vl.processing_qwen3_vl")
    sizes, frames, fps = tiny_qwen3_vl(), 5, 2.0
    side = sizes.vision.merged_patch_size
    tokenizer = Tokenizer.load(tiny_path())
    parts = ["A", Clip(np.zeros((frames, 3, 2 * side, side), np.uint8), fps), "B"]
    laid = lay_out(parts, tokenizer, PromptLayout.from_tokenizer(tokenizer), sizes.vision)
    processor = types.SimpleNamespace(
        all_special_multimodal_tokens=["<|video_pad|>"],
        **{"video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"},
        video_processor=types.SimpleNamespace(merge_size=2, temporal_patch_size=2),
        _calculate_timestamps=lambda *a: processing.Qwen3VLProcessor._calculate_timestamps(None, *a),
    )
    metadata = types.SimpleNamespace(fps=fps, frames_indices=list(range(frames)))
    said = processing.Qwen3VLProcessor.replace_video_token(processor, {"video_grid_thw": torch.tensor([[3, 4, 2]]), "video_metadata": [metadata]}, 0)
    text, _ = processing.Qwen3VLProcessor.get_text_with_replacements(processor, ["A<|vision_start|><|video_pad|><|vision_end|>B"], [], [said], [])
    assert tokenizer.encode(text[0].replace("A<|vision_start|>", "A").replace("<|vision_end|>B", "B")) == laid.tokens.tolist()
    assert text[0].count("<|vision_start|>") == 1 + tokenizer.decode(laid.tokens.tolist(), skip_special=False).count("<|vision_start|>") == 4


@pytest.mark.parametrize(("family", "sizes"), [("qwen2_5_vl", tiny), ("qwen2_vl", tiny_qwen2_vl), ("qwen3_vl", tiny_qwen3_vl)])
def test_a_model_of_ours_gives_its_logits_there(tmp_path, family, sizes):
    config = sizes(VOCABULARY)
    params = jax.tree.map(lambda a: a + 0.05, init_params(config, jax.random.key(0)))  # no bias of 0, no norm of 1
    folder = save_params(params, config, tmp_path / "ours", tokenizer_files_from=None)
    model = model_class(family).from_pretrained(folder, dtype=torch.float32).eval()
    model.config.image_token_id, model.config.video_token_id = IMAGE, VIDEO
    for p in (prompts(family)["text"], prompts(family)["all"]):
        np.testing.assert_allclose(our_logits(params, config, p), their_logits(model, config, p), atol=TOLERANCE, rtol=0)


def test_their_text_only_weights_give_their_logits(tmp_path):
    """Qwen2ForCausalLM, with the vision tower of a Qwen2.5-VL model of its size."""
    whole = theirs(tie_word_embeddings=False)
    whole.save_pretrained(tmp_path / "whole")
    stated = {key: value for key, value in whole.config.text_config.to_dict().items() if key not in ("model_type", "rope_parameters", "layer_types")}
    torch.manual_seed(1)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**stated, rope_parameters={"rope_type": "default", "rope_theta": 1e6})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "text")
    folder = convert(tmp_path / "text", tmp_path / "joined", form="hf", vision_from=tmp_path / "whole").path
    config, p = read_config(folder), prompts("qwen2_5_vl")["text"]
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(p.tokens)[None]).logits[0].numpy()
    assert wanted.std() > 0.1
    np.testing.assert_allclose(our_logits(load_params(folder, config), config, p), wanted, atol=TOLERANCE, rtol=0)
    again = model_class("qwen2_5_vl").from_pretrained(folder, dtype=torch.float32).eval()
    np.testing.assert_allclose(their_logits(again, config, p), wanted, atol=1e-5, rtol=0)


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


@pytest.mark.parametrize("family", CLASSES)
def test_adapters_go_both_ways(tmp_path, family):
    """peft's adapter, merged here, gives the logits of the model that has it; and one that is written here does in peft."""
    peft = pytest.importorskip("peft")
    model = theirs(family, layers=2)
    model.save_pretrained(tmp_path / "base")
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj", "qkv"], "rank_pattern": {"down_proj": 2}}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = convert(tmp_path / "base", tmp_path / "merged", form="hf", adapter=tmp_path / "adapter").path
    config, p = read_config(merged), prompts(family)["image"]
    wanted = their_logits(adapted, config, p)
    found = our_logits(load_params(merged, config), config, p)
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE, rtol=0)
    base = model_class(family).from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    assert np.abs(their_logits(base, config, p) - wanted).max() > 10 * TOLERANCE
    saved = save_adapter(read_adapter(tmp_path / "adapter", config), tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base, saved).eval()
    np.testing.assert_allclose(their_logits(again, config, p), wanted, atol=1e-5, rtol=0)


def test_adapters_of_a_run_are_what_it_learnt(tmp_path):
    """Those that `svlm convert RUN DST --to peft` writes, on the base in peft, give the logits of the run with its adapters merged."""
    peft = pytest.importorskip("peft")
    from test_run_form import write

    _, state = write(tmp_path / "run", "step.lora.rank=4", "step.lora.alpha=8")
    assert all(np.any(leaf) for leaf in state.trained.values())
    saved = convert(tmp_path / "run", tmp_path / "adapter", form="peft").path
    merged = load(convert(tmp_path / "run", tmp_path / "merged").path)
    base = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_path(), dtype=torch.float32).eval()
    p = Prompt(np.arange(9), np.broadcast_to(np.arange(9, dtype=np.int32)[:, None], (9, 3)).copy(), np.zeros(0, np.int32), ())
    alone = their_logits(base, merged.config, p)
    found = their_logits(peft.PeftModel.from_pretrained(base, saved).eval(), merged.config, p)
    np.testing.assert_allclose(found, our_logits(merged.params, merged.config, p), atol=TOLERANCE, rtol=0)
    assert np.abs(found - alone).max() > 10 * TOLERANCE


def test_pixels_become_their_patches():
    """Our patches against their image processor's, which resizes nothing at this size. Their video processor needs torchvision."""
    processing = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    frame = np.random.default_rng(0).integers(0, 256, (3, 84, 140), dtype=np.uint8)
    found = np.asarray(patchify(tiny().vision, jnp.asarray(frame[None, None])))[0]
    processor = processing.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=10**6)
    wanted = processor(images=[frame.transpose(1, 2, 0)], return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
