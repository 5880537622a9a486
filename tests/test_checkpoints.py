"""Checkpoints: what is read is what was written, whoever wrote it, and every mismatch is one line that names the thing."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from devices import on_four_devices
from safetensors.numpy import load_file, save_file

from svlm_jax.checkpoints import save as save_module
from svlm_jax.checkpoints.hub_config import TokenIds, read_config, write_config
from svlm_jax.checkpoints.layouts import to_stacked, to_unstacked
from svlm_jax.checkpoints.load import LoadedModel, load, load_params
from svlm_jax.checkpoints.names import canonical, name_table
from svlm_jax.checkpoints.plan import leaves
from svlm_jax.checkpoints.save import save_params
from svlm_jax.configs.models import tiny
from svlm_jax.demo.make_tiny import make, tiny_path
from svlm_jax.errors import UserError
from svlm_jax.model.qwen_vl import abstract_params, forward, init_params, is_stacked
from svlm_jax.streaming.prompt import PromptLayout
from svlm_jax.tokenizer import Tokenizer

CONFIG = tiny(96)
TIED = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, tie_word_embeddings=True))
INDEX = "model.safetensors.index.json"


def in_memory(name: str) -> str:
    """The spelling of transformers' own modules, which some trainers write out."""
    if name.startswith("visual."):
        return "model." + name
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


SPELLINGS = {"hub": str, "memory": in_memory, "peft": lambda name: "base_model.model." + in_memory(name)}


def tensors(config=CONFIG, dtype=np.float32) -> dict[str, np.ndarray]:
    """Random tensors of a checkpoint, by their names on the Hub."""
    rng = np.random.default_rng(0)
    return {piece.name: rng.standard_normal(piece.source_shape, np.float32).astype(dtype) for piece in name_table(config)}


def write(folder: Path, content: dict[str, np.ndarray], *, config=CONFIG, shards: int = 1, spell=str) -> Path:
    """A checkpoint by another hand: the safetensors library's."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(write_config(config)))
    spelled = {spell(name): tensor for name, tensor in content.items()}
    if shards == 1:
        save_file(spelled, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(spelled)}
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in spelled.items() if weight_map[name] == file}, folder / file)
    total = sum(tensor.nbytes for tensor in spelled.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return folder


def assert_same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path / "checkpoint", tensors())


# --- the table


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_the_table_fills_every_number_once(config, stacked):
    pieces = name_table(config, stacked=stacked)
    assert len({piece.name for piece in pieces}) == len(pieces)
    counts = {path: np.zeros(leaf.shape, int) for path, leaf in leaves(abstract_params(config, stacked=stacked))}
    for piece in pieces:
        counts[piece.path][piece.index or ...] += piece.load(np.ones(piece.source_shape, int))
    assert all((count == 1).all() for count in counts.values())


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_has_one_canonical_form(spell):
    assert all(canonical(spell(piece.name)) == piece.name for piece in name_table(CONFIG))


# --- loading


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_tensors_come_to_their_places(tmp_path, spell, shards):
    content = tensors()
    params = load_params(write(tmp_path / "checkpoint", content, shards=shards, spell=spell), CONFIG)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(lambda a: (a.shape, a.dtype), abstract_params(CONFIG))
    x = np.random.default_rng(1).standard_normal(64, np.float32)
    layer = params["text"]["layers"][1]
    for name, block in (("q_proj", np.s_[:, :, :-2]), ("k_proj", np.s_[:, :, -2]), ("v_proj", np.s_[:, :, -1])):
        ours = np.tensordot(x, np.asarray(layer["qkv"])[block], 1).reshape(-1) + np.asarray(layer["qkv_bias"])[block[1:]].reshape(-1)
        theirs = content[f"model.layers.1.self_attn.{name}.weight"] @ x + content[f"model.layers.1.self_attn.{name}.bias"]
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(layer["gate_up"][:, 1], content["model.layers.1.mlp.up_proj.weight"].T)
    np.testing.assert_array_equal(params["text"]["head"], content["lm_head.weight"].T)
    np.testing.assert_array_equal(params["vision"]["patch_embed"], content["visual.patch_embed.proj.weight"].reshape(32, -1).T)


def test_stacked_is_unstacked(checkpoint):
    stacked, params = load_params(checkpoint, CONFIG, stacked=True), load_params(checkpoint, CONFIG)
    assert is_stacked(stacked) and not is_stacked(params)
    assert_same(to_unstacked(load_params(checkpoint, CONFIG, stacked=True)), params)
    assert_same(to_stacked(load_params(checkpoint, CONFIG)), stacked)
    assert to_stacked(stacked) is stacked and to_unstacked(params) is params


def test_changing_the_layout_frees_the_old_one():
    params = init_params(CONFIG, jax.random.key(0))
    layer, embedding = params["text"]["layers"][0], params["text"]["embedding"]
    stacked = to_stacked(params)
    assert all(leaf.is_deleted() for leaf in layer.values()) and not embedding.is_deleted()
    leaf = stacked["text"]["layers"]["qkv"]
    to_unstacked(stacked)
    assert leaf.is_deleted()


def test_layouts_change_under_jit():
    params = init_params(CONFIG, jax.random.key(0))
    assert_same(jax.jit(lambda p: to_unstacked(to_stacked(p)))(params), params)


@pytest.mark.parametrize(("stored", "wanted"), [(np.float32, jnp.bfloat16), (ml_dtypes.bfloat16, jnp.float32), (np.float16, jnp.float32)])
def test_dtypes(tmp_path, stored, wanted):
    folder = write(tmp_path / "checkpoint", tensors(dtype=stored))
    kept, cast = load_params(folder, CONFIG), load_params(folder, CONFIG, dtype=wanted)
    assert jax.tree.leaves(kept)[0].dtype == stored
    assert_same(cast, jax.tree.map(lambda a: a.astype(wanted), kept))


def test_progress_ends_at_the_total(checkpoint):
    calls = []
    load_params(checkpoint, CONFIG, progress=lambda done, total: calls.append((done, total)))
    total = sum(tensor.nbytes for tensor in tensors().values())
    assert calls == sorted(calls) and calls[-1] == (total, total)


def test_one_device_or_one_sharding_for_all(checkpoint):
    device = jax.devices()[0]
    for place in (device, jax.sharding.SingleDeviceSharding(device)):
        params = load_params(checkpoint, CONFIG, shardings=place)
        assert all(leaf.committed and leaf.devices() == {device} for leaf in jax.tree.leaves(params))
        assert_same(params, load_params(checkpoint, CONFIG))


def test_a_head_that_repeats_a_tied_embedding_is_dropped(tmp_path):
    content = tensors(TIED)
    folder = write(tmp_path / "checkpoint", {**content, "lm_head.weight": content["model.embed_tokens.weight"].copy()}, config=TIED)
    assert "head" not in load_params(folder, TIED)["text"]
    other = content["model.embed_tokens.weight"].copy()
    other[-1, -1] += 1
    write(folder, {**content, "lm_head.weight": other}, config=TIED)
    with pytest.raises(UserError, match=r"^lm_head\.weight in .*model\.safetensors differs from the embedding, but config\.json ties"):
        load_params(folder, TIED)


SHARDED_LOAD = """
import sys, jax, numpy as np
from pathlib import Path
from svlm_jax.configs.models import tiny
from svlm_jax.checkpoints.layouts import to_stacked, to_unstacked
from svlm_jax.checkpoints.load import load_params
from svlm_jax.checkpoints.plan import leaves
from svlm_jax.checkpoints.save import save_params
from svlm_jax.sharding import make_mesh, param_shardings
folder, config = Path(sys.argv[1]), tiny(96)
plain = load_params(folder, config)
same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
for sizes in ({"tensor": 2}, {"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2}, {"tensor": 4}):
    mesh = make_mesh(**sizes)
    for stacked in (False, True):
        shardings = param_shardings(config, mesh, stacked=stacked)
        params = load_params(folder, config, stacked=stacked, shardings=shardings)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), params, shardings)))
        other = (to_unstacked if stacked else to_stacked)(params)
        want = param_shardings(config, mesh, stacked=not stacked)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), other, want)))
        same(to_unstacked(other), plain)
mesh = make_mesh(fsdp=2, tensor=2)
params = load_params(folder, config, shardings=param_shardings(config, mesh))
saved = save_params(params, config, folder.parent / "again")
same(load_params(saved, config), plain)
"""


def test_shards_hold_the_same_numbers(checkpoint):
    on_four_devices(SHARDED_LOAD, checkpoint)


MEASURED_LOAD = """
import dataclasses, math, resource, sys, time, jax, numpy as np
from pathlib import Path
from svlm_jax.checkpoints.load import load_params
from svlm_jax.checkpoints.names import name_table
from svlm_jax.checkpoints.safetensors_file import Outgoing, write_file
from svlm_jax.configs.models import tiny
from svlm_jax.model.qwen_vl import abstract_params
config = tiny(20_000)
text = dataclasses.replace(config.text, hidden_size=512, intermediate_size=4_096, num_hidden_layers=4, num_attention_heads=32)
config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, out_hidden_size=512), text=text)
stacked = sys.argv[2] == "stacked"
out = [Outgoing(p.name, "F32", p.source_shape) for p in name_table(config)]
write_file(Path(sys.argv[1]) / "model.safetensors", out, (np.ones(t.shape, np.float32) for t in out))
jax.block_until_ready(jax.numpy.zeros(8))
sizes = [4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config, stacked=stacked))]
pages = int(open("/proc/self/statm").read().split()[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = pages * resource.getpagesize()
params = load_params(sys.argv[1], config, stacked=stacked)
status = Path("/proc/self/status").read_text()
peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
print(peak - before, sum(sizes), max(sizes))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("layout", ["layers", "stacked"])
def test_memory_is_bounded_by_the_largest_parameters(tmp_path, layout):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", MEASURED_LOAD, str(tmp_path), layout]
    done = subprocess.run(command, env=environment, check=True, timeout=300, stdout=subprocess.PIPE, text=True)
    used, params, largest = map(int, done.stdout.split())
    assert params > 170e6
    assert used < params + 2 * largest


# --- what is wrong is said


def resaved(folder: Path, change) -> None:
    content = load_file(folder / "model.safetensors")
    change(content)
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})


def cut(file: Path, to: int | None, more: bytes = b"") -> None:
    file.write_bytes(file.read_bytes()[:to] + more)


MISTAKES = {
    "missing": (lambda c: c.pop("model.norm.weight"), r"lacks model\.norm\.weight, which config\.json calls for"),
    "several": (lambda c: [c.pop("model.norm.weight"), c.pop("lm_head.weight")], r"lacks lm_head\.weight and 1 more"),
    "extra": (lambda c: c.update({"model.extra": np.ones(2, np.float32)}), r"holds model\.extra \(in model\.safetensors\), which no model"),
    "shape": (
        lambda c: c.update({"model.norm.weight": np.ones(65, np.float32)}),
        r"^model\.norm\.weight in .*model\.safetensors has shape \[65\], but config\.json describes \[64\]",
    ),
    "transposed": (
        lambda c: c.update({"model.layers.0.mlp.up_proj.weight": np.ones((64, 128), np.float32)}),
        r"up_proj\.weight in .* has shape \[64, 128\], but config\.json describes \[128, 64\]",
    ),
    "integers": (lambda c: c.update({"model.norm.weight": np.ones(64, np.int32)}), r"^model\.norm\.weight in .* is stored as I32"),
    "mixed": (
        lambda c: c.update({"model.norm.weight": np.ones(64, np.float16)}),
        r"^model\.norm\.weight in .* is stored as F16, but",
    ),
    "twice": (
        lambda c: c.update({"model.language_model.norm.weight": np.ones(64, np.float32)}),
        r"^model\.(language_model\.)?norm\.weight in .* is model\.(language_model\.)?norm\.weight in .* again",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_the_tensors(checkpoint, change, message, monkeypatch):
    resaved(checkpoint, change)
    monkeypatch.setattr(jax, "device_put", None)  # all is found before anything is allocated
    with pytest.raises(UserError, match=message) as caught:
        load_params(checkpoint, CONFIG)
    assert "\n" not in str(caught.value)


def test_mixed_dtypes_load_as_the_one_asked_for(checkpoint):
    plain = load_params(checkpoint, CONFIG, dtype=jnp.bfloat16)
    resaved(checkpoint, lambda c: c.update({"lm_head.weight": c["lm_head.weight"].astype(ml_dtypes.bfloat16)}))
    assert_same(load_params(checkpoint, CONFIG, dtype=jnp.bfloat16), plain)


BROKEN_FILES = {
    "truncated": (lambda f: cut(f / "model.safetensors", -100), r"model\.safetensors is cut short \(\d+ bytes of \d+\): download it again"),
    "in the header": (lambda f: cut(f / "model.safetensors", 99), r"cut short within its header"),
    "empty": (lambda f: cut(f / "model.safetensors", 0), r"cut short within its header \(0 bytes\)"),
    "longer": (lambda f: cut(f / "model.safetensors", None, b"x"), r"is longer than its header says"),
    "pointer": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"), r"is a Git LFS pointer"),
    "page": (lambda f: (f / "model.safetensors").write_text("<!DOCTYPE html>" * 99), r"is not a safetensors file"),
    "no JSON": (lambda f: (f / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"\xff{{{"), r"header that is not JSON"),
    "odd": (lambda f: (f / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b'{"a": 1}'), r"does not follow the safetensors"),
    "none": (lambda f: (f / "model.safetensors").unlink(), r"no weights in .*: it needs model\.safetensors, or model"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_broken_files(checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(UserError, match=message) as caught:
        load_params(checkpoint, CONFIG)
    assert "\n" not in str(caught.value)


def test_pickles_are_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was run",))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="holds pickled PyTorch weights only, which are not read"):
        load_params(tmp_path, CONFIG)


def test_adapters_and_lost_indexes(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_params(tmp_path, CONFIG)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter, not a model: merge it"):
        load_params(tmp_path, CONFIG)


def test_indexes_and_shards_must_agree(tmp_path):
    folder = write(tmp_path / "checkpoint", tensors(), shards=2)
    index, shard = folder / INDEX, folder / "model-00002-of-00002.safetensors"
    original = json.loads(index.read_text())
    moved = {**original["weight_map"], **dict.fromkeys(("model.norm.weight", "lm_head.weight"), "model-00001-of-00002.safetensors")}
    index.write_text(json.dumps({**original, "weight_map": moved}))
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors lacks (model\.norm|lm_head)\.weight, which model\.safe"):
        load_params(folder, CONFIG)
    for content in ('{"weight_map": {"a": "../../etc/passwd"}}', "{}", "[", '{"weight_map": []}'):
        index.write_text(content)
        with pytest.raises(UserError, match=r"index\.json cannot be read"):
            load_params(folder, CONFIG)
    index.write_text(json.dumps(original))
    shard.unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is missing, which model\.safetensors\.index\.json names"):
        load_params(folder, CONFIG)


# --- saving


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_round_trip_changes_no_bit(tmp_path, dtype, stacked):
    content = tensors(dtype=dtype)
    params = load_params(write(tmp_path / "first", content, spell=in_memory), CONFIG, stacked=stacked)
    saved = save_params(params, CONFIG, tmp_path / "second")
    again = load_file(saved / "model.safetensors")
    assert again.keys() == content.keys()
    assert all(again[name].dtype == dtype and again[name].tobytes() == content[name].tobytes() for name in content)
    assert dataclasses.replace(read_config(saved), name="") == dataclasses.replace(CONFIG, name="")
    assert json.loads((saved / "config.json").read_text())["torch_dtype"] == np.dtype(dtype).name


def test_shards_and_their_index(tmp_path, checkpoint):
    content = tensors()
    params = load_params(checkpoint, CONFIG)
    saved = save_params(params, CONFIG, tmp_path / "second", shard_bytes=300_000)
    index = json.loads((saved / INDEX).read_text())
    files = sorted(file.name for file in saved.glob("*.safetensors"))
    assert len(files) == 4 and files[-1] == "model-00004-of-00004.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in content.values())
    assert {name: file for file in files for name in load_file(saved / file)} == index["weight_map"]
    assert index["weight_map"].keys() == content.keys()
    assert_same(load_params(saved, CONFIG), params)
    for file in files:
        assert sum(t.nbytes for t in load_file(saved / file).values()) <= 300_000


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path, checkpoint):
    params = load_params(checkpoint, CONFIG)
    assert_same(load_params(save_params(params, CONFIG, tmp_path / "second", shard_bytes=1), CONFIG), params)


def test_companions_are_copied_and_ids_are_the_tokenizers(tmp_path):
    model = load(tiny_path())
    saved = save_params(model.params, model.config, tmp_path / "copy", tokenizer_files_from=tiny_path())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors", "config.json"):
        assert (saved / name).read_bytes() == (tiny_path() / name).read_bytes(), name
    assert json.loads((saved / "config.json").read_text())["video_token_id"] == model.tokenizer.special("<|video_pad|>")


def test_nothing_half_written_is_left(tmp_path, checkpoint, monkeypatch):
    params = load_params(checkpoint, CONFIG)
    target = tmp_path / "out" / "model"

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save_module, "write_json", fail)  # after the weights
    with pytest.raises(UserError, match=r"out/model cannot be written \(No space left on device\)"):
        save_params(params, CONFIG, target)
    assert list(target.parent.iterdir()) == []


def test_what_exists_is_not_written_over(tmp_path):
    with pytest.raises(UserError, match="exists already"):
        save_params({}, CONFIG, tmp_path)


def test_parameters_that_are_not_the_configs(tmp_path):
    params = init_params(CONFIG, jax.random.key(0))
    with pytest.raises(UserError, match=r"parameter text\.(embedding|head) has shape"):
        save_params(params, tiny(128), tmp_path / "a")
    with pytest.raises(UserError, match=r"parameter text\.head is not in the config"):
        save_params(params, TIED, tmp_path / "a")
    params["text"]["norm"] = params["text"]["norm"].astype(jnp.bfloat16)
    with pytest.raises(UserError, match="parameters of bfloat16, float32 cannot be saved"):
        save_params(params, CONFIG, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


# --- whole models


def test_the_bundled_model():
    model = load(tiny_path())
    assert isinstance(model, LoadedModel) and model.config.name == "tiny" and model.path == tiny_path()
    assert (tiny_path() / "model.safetensors").stat().st_size < 2_000_000
    assert "weights are random" in (tiny_path() / "README.md").read_text()
    fresh = make(model.tokenizer)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0.02, atol=1e-5), model.params, fresh)
    assert TokenIds.of(model.tokenizer).turn_end == json.loads((tiny_path() / "config.json").read_text())["eos_token_id"]


def test_the_bundled_model_says_varied_words():
    model = load(tiny_path(), dtype=jnp.float32)
    layout, length = PromptLayout.from_tokenizer(model.tokenizer), 64
    positions = jnp.broadcast_to(jnp.arange(length)[None, :, None], (1, length, 3))
    step = jax.jit(lambda tokens: jax.nn.softmax(forward(model.params, model.config, tokens, positions)[0]))
    prompt = [*layout.system, *layout.user_head, *layout.block_close, *layout.assistant_head]
    rng, said = np.random.default_rng(0), []
    structural = [model.tokenizer.special(name) for name in ("<|im_start|>", "<|video_pad|>", "<|vision_start|>", "<|endoftext|>")]
    for _ in range(3):
        ids = list(prompt)
        while len(ids) < length and ids[-1] != layout.im_end:
            chances = np.asarray(step(np.array([ids + [0] * (length - len(ids))])))[len(ids) - 1].astype(float)
            assert chances[structural].sum() < 1e-4
            ids.append(int(rng.choice(len(chances), p=chances / chances.sum())))
        said += ids[len(prompt) :]
    words = model.tokenizer.decode(said).split()
    assert len(set(words)) > 0.4 * len(words) > 8


def test_a_tokenizer_of_another_model(tmp_path):
    save_params(init_params(CONFIG, jax.random.key(0)), CONFIG, tmp_path / "model", tokenizer_files_from=tiny_path())
    with pytest.raises(UserError, match=r"the tokenizer in .* has \d+ tokens, but the model embeds 96"):
        load(tmp_path / "model")


@pytest.mark.parametrize("path", ["no/such/directory", "/no/such", "nowhere", "./a/b"])
def test_no_such_directory(path):
    with pytest.raises(UserError, match="is not a directory: pass the one"):
        load(path)


def hub(monkeypatch, function) -> list:
    """Puts a stand-in for huggingface_hub in place; returns the list of its calls."""
    calls = []

    def snapshot_download(name, **settings):
        calls.append((name, settings.get("local_files_only", False)))
        return function(settings.get("local_files_only", False))

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    return calls


def test_the_hubs_cache_comes_first(monkeypatch):
    calls = hub(monkeypatch, lambda local: str(tiny_path()))
    model = load("someone/model-7b")
    assert calls == [("someone/model-7b", True)] and model.config.name == "model-7b"
    assert isinstance(model.tokenizer, Tokenizer)


def test_a_partly_cached_model_is_downloaded(monkeypatch, tmp_path):
    calls = hub(monkeypatch, lambda local: str(tmp_path if local else tiny_path()))
    assert load("someone/model").path == tiny_path()
    assert calls == [("someone/model", True), ("someone/model", False)]


def test_no_network(monkeypatch):
    def fail(local):
        raise ConnectionError("no route\nto host")

    hub(monkeypatch, fail)
    with pytest.raises(UserError, match=r"^someone/model is not a directory here, .*\(no route\): download it \(`hf download"):
        load("someone/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="huggingface_hub is not installed"):
        load("someone/model")
