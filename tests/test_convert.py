"""Checkpoints from one form to the other and back: not a bit changes, nothing half done is left, and mistakes are told in one line."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from devices import on_four_devices
from safetensors.numpy import load_file, save_file

from svlm_jax import cli
from svlm_jax.checkpoints import convert as convert_module
from svlm_jax.checkpoints import staging
from svlm_jax.checkpoints.convert import convert
from svlm_jax.checkpoints.hub_config import FAMILIES, family_of, write_config
from svlm_jax.checkpoints.load import load, load_params
from svlm_jax.checkpoints.names import in_memory, name_table
from svlm_jax.checkpoints.orbax_form import is_orbax
from svlm_jax.checkpoints.source import finite
from svlm_jax.commands.progress import ProgressLine, status
from svlm_jax.configs.models import tiny, tiny_qwen2_vl, tiny_qwen3_vl
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.errors import UserError

CONFIGS = {"qwen2_5_vl": tiny(96), "qwen2_vl": tiny_qwen2_vl(96), "qwen3_vl": tiny_qwen3_vl(96)}
INDEX = "model.safetensors.index.json"


def tensors(config, dtype=ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
    rng, spelt = np.random.default_rng(0), in_memory if FAMILIES[family_of(config)].spelt_as_in_memory else str
    return {spelt(piece.name): rng.standard_normal(piece.source_shape, np.float32).astype(dtype) for piece in name_table(config)}


def write(folder: Path, family: str = "qwen2_5_vl", dtype=ml_dtypes.bfloat16, **changes: np.ndarray) -> Path:
    """A checkpoint in two files by the safetensors library."""
    config = CONFIGS[family]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(write_config(config, dtype=np.dtype(dtype).name)))
    content = tensors(config, dtype) | changes
    files = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: files[i % 2] for i, name in enumerate(content)}
    for file in files:
        save_file({name: tensor for name, tensor in content.items() if weight_map[name] == file}, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    return folder


def read(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_bits(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and tensor.shape == two[name].shape, name
        assert tensor.tobytes() == two[name].tobytes(), name


@pytest.fixture(scope="module")
def forms(tmp_path_factory) -> tuple[Path, Path]:
    """One checkpoint in both forms, with chunks so small that arrays have many."""
    folder = tmp_path_factory.mktemp("forms")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("svlm_jax.checkpoints.orbax_form.CHUNK_BYTES", 1 << 11)
        convert(write(folder / "hf"), folder / "orbax")
    return folder / "hf", folder / "orbax"


# --- there and back


@pytest.mark.parametrize("family", CONFIGS)
def test_there_and_back_no_bit_changes(tmp_path, family):
    source = write(tmp_path / "hf", family)
    there = convert(source, tmp_path / "orbax")
    assert there.form == "orbax" and is_orbax(there.path) and there.nbytes == sum(t.nbytes for t in read(source).values())
    back = convert(there.path, tmp_path / "back", shard_bytes=200_000)
    assert_same_bits(read(source), read(back.path))
    assert len(list(back.path.glob("*.safetensors"))) > 2
    for name in ("config.json", "generation_config.json"):
        assert json.loads((back.path / name).read_text()) == json.loads((source / name).read_text())


def test_another_dtype(forms, tmp_path):
    """Widened, every number is the same; narrowed again, every bit."""
    wide = convert(forms[0], tmp_path / "wide", form="hf", dtype=np.float32)
    found, kept = read(wide.path), read(forms[0])
    assert all(found[name].dtype == np.float32 and np.array_equal(found[name], kept[name].astype(np.float32)) for name in kept)
    assert json.loads((wide.path / "config.json").read_text())["torch_dtype"] == "float32"
    convert(wide.path, tmp_path / "narrow", form="hf", dtype=ml_dtypes.bfloat16)
    assert_same_bits(read(tmp_path / "narrow"), kept)


def test_any_form_is_loaded(forms):
    for stacked in (False, True):
        one, two = (load_params(folder, CONFIGS["qwen2_5_vl"], stacked=stacked) for folder in forms)
        jax.tree.map(np.testing.assert_array_equal, one, two)
    wide = load_params(forms[1], CONFIGS["qwen2_5_vl"], dtype=np.float32)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, np.float32)), wide, load_params(forms[0], CONFIGS["qwen2_5_vl"]))


def test_the_bundled_model_speaks_from_orbax(tmp_path):
    model = load(convert(tiny_path(), tmp_path / "orbax").path)
    assert model.tokenizer.vocab_size == load(tiny_path()).tokenizer.vocab_size
    jax.tree.map(np.testing.assert_array_equal, model.params, load(tiny_path()).params)


SHARDED = """
import sys, jax, numpy as np
from pathlib import Path
from svlm_jax.checkpoints import orbax_form
from svlm_jax.checkpoints.load import load_params
from svlm_jax.configs.models import tiny
from svlm_jax.sharding import make_mesh, param_shardings
hf, orbax, config = Path(sys.argv[1]), Path(sys.argv[2]), tiny(96)
plain = load_params(hf, config)
for sizes in ({"fsdp": 2, "tensor": 2}, {"tensor": 4}):
    mesh = make_mesh(**sizes)
    for stacked in (False, True):
        shardings = param_shardings(config, mesh, stacked=stacked)
        params = load_params(orbax, config, stacked=stacked, shardings=shardings)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), params, shardings)))
        want = load_params(hf, config, stacked=stacked)
        jax.tree.map(np.testing.assert_array_equal, params, want)
"""


def test_orbax_onto_a_mesh(forms):
    on_four_devices(SHARDED, *forms)


# --- what is wrong is said, and nothing is left


def damage_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def damage_tensor(folder: Path, name: str, change) -> None:
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    content = load_file(file)
    change(content)
    save_file(content, file, metadata={"format": "pt"})


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def spoil(content: dict[str, np.ndarray], value: float) -> None:
    content["model.layers.1.mlp.up_proj.weight"][5, 7] = value


UP = "model.layers.1.mlp.up_proj.weight"
SECOND = "model-00002-of-00002.safetensors"
BAD = {
    "missing shard": (lambda f: (f / SECOND).unlink(), r"model-00002-of-00002\.safetensors is missing"),
    "truncated": (lambda f: cut(f / SECOND), r"model-00002-of-00002\.safetensors is cut short"),
    "extra": (lambda f: damage_tensor(f, UP, lambda c: c.update(more=np.ones(2, np.float32))), r"holds more \(in "),
    "missing": (lambda f: damage_tensor(f, UP, lambda c: c.pop(UP)), r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
    "shape": (lambda f: damage_tensor(f, UP, lambda c: c.update({UP: c[UP].T.copy()})), r"^model\.layers\.1\.mlp\.up_proj\.weight in .* has shape"),
    "family": (
        lambda f: (f / "config.json").write_text(json.dumps(write_config(CONFIGS["qwen2_vl"]))),
        r"holds weights of Qwen2\.5-VL \(there is visual\.blocks\.0\.mlp\.gate_proj\.weight\), which its config\.json does not describe",
    ),
    "unknown family": (lambda f: damage_json(f / "config.json", model_type="llava"), r"model_type 'llava', which is not supported"),
    "NaN": (
        lambda f: damage_tensor(f, UP, lambda c: spoil(c, np.nan)),
        r"^model\.layers\.1\.mlp\.up_proj\.weight holds numbers that are not finite",
    ),
    "infinite": (lambda f: damage_tensor(f, UP, lambda c: spoil(c, -np.inf)), r"^model\.layers\.1\.mlp\.up_proj\.weight holds numbers"),
    "dtype": (lambda f: damage_tensor(f, UP, lambda c: c.update({UP: np.ones((128, 64), np.int8)})), r"up_proj\.weight in .* is stored as I8"),
    "no config": (lambda f: (f / "config.json").unlink(), r"no config\.json in"),
    "no weights": (lambda f: [file.unlink() for file in f.glob("model*")], r"no weights in"),
    "pickles": (
        lambda f: [file.rename(file.with_suffix(".bin")) for file in f.glob("model*")],
        r"holds pickled PyTorch weights only, which are not read",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("form", ["orbax", "hf"])
def test_bad_input_leaves_nothing(tmp_path, damage, message, form):
    source = write(tmp_path / "hf")
    damage(source)
    target = tmp_path / "out" / "model"
    with pytest.raises(UserError, match=message) as caught:
        convert(source, target, form=form)
    assert "\n" not in str(caught.value)
    assert not target.parent.exists() or not list(target.parent.iterdir())


def test_a_pickle_is_not_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch here'\ntR.")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle, which may run any code"):
        convert(tmp_path / "pytorch_model.bin", tmp_path / "out")


ORBAX_BAD = {
    "config": (lambda f: damage_json(f / "config.json", vocab_size=97), r"^parameter text\.(embedding|head) in .* has shape"),
    "layers": (lambda f: damage_json(f / "config.json", num_hidden_layers=4), r"lacks parameter text\.layers\.3\.\w+ and 6 more, which config"),
    "fewer layers": (lambda f: damage_json(f / "config.json", num_hidden_layers=2), r"holds parameter text\.layers\.2\.\w+ and 6 more, which no"),
    "data": (lambda f: [cut(file) for file in chunks_of(f)], r"params cannot be read \("),
    "a chunk cut": (lambda f: cut(chunks_of(f)[0]), r"params cannot be read \("),
    "a chunk missing": (lambda f: chunks_of(f)[0].unlink(), r"params cannot be read \(.* is missing\)"),
    "metadata": (lambda f: next((f / "params").rglob("_METADATA")).write_text("{"), r"params cannot be read \("),
}


def chunks_of(folder: Path) -> list[Path]:
    """The files of an Orbax checkpoint that hold numbers."""
    found = [file for file in sorted((folder / "params").rglob("c/**/*")) if file.is_file()]
    assert len(found) > 20
    return found


@pytest.mark.parametrize(("damage", "message"), ORBAX_BAD.values(), ids=ORBAX_BAD)
def test_bad_orbax_leaves_nothing(tmp_path, forms, damage, message):
    source = tmp_path / "orbax"
    subprocess.run(["cp", "-r", forms[1], source], check=True)
    damage(source)
    with pytest.raises(UserError, match=message) as caught:
        convert(source, tmp_path / "out" / "model")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_damaged_arrays_are_told_in_one_line(tmp_path, forms):
    """In a process of its own: what the library would say of every other read comes when the program ends."""
    source = tmp_path / "orbax"
    subprocess.run(["cp", "-r", forms[1], source], check=True)
    for file in chunks_of(source):
        cut(file)
    command = [sys.executable, "-m", "svlm_jax.cli", "convert", str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [line for line in done.stderr.splitlines() if line.startswith("svlm: ")] and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_number_too_large_for_the_dtype(tmp_path):
    source = write(tmp_path / "hf", dtype=np.float32, **{UP: np.full((128, 64), 1e6, np.float32)})
    with pytest.raises(UserError, match=r"up_proj\.weight holds numbers that are not finite \(NaN or infinite\) as float16"):
        convert(source, tmp_path / "half", dtype=np.float16)
    assert not (tmp_path / "half").exists()


def test_finite_looks_at_every_number():
    for dtype in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16):
        array = np.full((3, 1 << 20), np.finfo(np.float16).max, dtype)  # more than is looked at in one go
        assert finite(array)
        for bad in (np.nan, np.inf, -np.inf):
            array[-1, -1] = bad
            assert not finite(array) and not finite(array.T)


def test_a_full_disk(tmp_path, forms, monkeypatch):
    """Known beforehand; and where it fills up on the way, which Orbax tells as an error of its own."""
    usage = type("usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr(staging.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(UserError, match=r"out needs 0\.0 GB and 0\.0 GB are free on its disk"):
            convert(forms[0], tmp_path / "out")
    ocp = convert_module.library()
    failure = ValueError("UNKNOWN: Error writing local file: [OS error 28: No space left on device]\nwhile saving")
    with monkeypatch.context() as patch:
        patch.setattr(ocp.partial, "finalize", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match=r"out cannot be written \(No space left on device\)"):
            convert(forms[0], tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(ocp.partial, "save", lambda *_: (_ for _ in ()).throw(failure))
        with pytest.raises(UserError, match=r"out cannot be written \(No space left on device\)"):
            convert(forms[0], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_kept(tmp_path, forms):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists already"):
        convert(forms[0], tmp_path / "out")


SLOW = """
import sys, time
from svlm_jax.checkpoints import convert as module
def hang(folder):
    print("writing", flush=True)
    time.sleep(600)
module.write_json = lambda file, content: hang(file)
from svlm_jax.cli import main
main(["convert", sys.argv[1], sys.argv[2]])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interruption_leaves_no_checkpoint_and_may_be_run_again(tmp_path, forms, number):
    """Stopped after the weights and before the end; what a killed process could not remove, the next one does."""
    target = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SLOW, forms[0], target], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    left = list(tmp_path.iterdir())
    if number == signal.SIGINT:
        assert process.returncode == 130 and errors.endswith("svlm: stopped\n") and left == []
    else:
        assert [path.name[:5] for path in left] == [".out."] and not target.exists()
        with pytest.raises(UserError, match=r"no config\.json in"):
            load(left[0])
    convert(forms[0], target)
    assert list(tmp_path.iterdir()) == [target]
    assert_same_bits(read(forms[0]), read(convert(target, tmp_path / "back").path))


# --- the command line


def test_convert_inspect_and_check(tmp_path, forms, capsys):
    assert cli.run(["convert", str(forms[0]), str(tmp_path / "orbax")]) == 0
    out, err = capsys.readouterr()
    assert "228,512 parameters, 457,024 bytes of bfloat16 in Orbax's form" in out and "done in" in err
    assert cli.run(["inspect", str(tmp_path / "orbax")]) == 0
    orbax = capsys.readouterr().out
    assert "family      Qwen2.5-VL, in Orbax's form" in orbax and "bfloat16 457,024 bytes" in orbax
    assert cli.run(["inspect", str(forms[0])]) == 0
    assert "BF16 457,024 bytes" in capsys.readouterr().out
    assert cli.run(["check", str(forms[0]), "--against", str(tmp_path / "orbax")]) == 0
    assert "all 228,512 numbers are those of" in capsys.readouterr().out


def test_check_finds_one_bit(tmp_path, forms, capsys):
    other = write(tmp_path / "other")
    damage_tensor(other, UP, lambda c: spoil(c, 0.125))
    assert cli.run(["check", str(forms[1]), "--against", str(other)]) == 1
    assert "1 of 16,384 numbers of model.layers.1.mlp.gate_proj.weight, model.layers.1.mlp.up_proj.weight differ" in capsys.readouterr().err
    damage_tensor(other, UP, lambda c: spoil(c, np.nan))
    assert cli.run(["check", str(other)]) == 1
    assert "svlm: model.layers.1.mlp.up_proj.weight holds numbers that are not finite" in capsys.readouterr().err


def test_checks_of_different_things(tmp_path, forms, capsys):
    damage_json(write(tmp_path / "other") / "config.json", rope_theta=5.0)
    assert cli.run(["check", str(forms[0]), "--against", str(tmp_path / "other")]) == 1
    assert "are not of one model: text.rope_theta differs" in capsys.readouterr().err
    convert(forms[0], tmp_path / "wide", form="hf", dtype=np.float32)
    assert cli.run(["check", str(tmp_path / "wide"), "--against", str(forms[0])]) == 1
    assert "is float32 and" in capsys.readouterr().err


def test_progress():
    assert status(4_200_000_000, 16_600_000_000, 14.0) == "4.2 of 16.6 GB, 300 MB/s, 00:41 to go"
    assert status(2_000_000, 2_000_000, 4000.0) == "2.0 of 2.0 MB, 0 MB/s, done in 1:06:40"

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return live

    for live, wanted in ((True, 25), (False, 4)):  # a line every 0.2 s, or every 10 s
        clock, out = [0.0], Terminal(newline="")
        with ProgressLine("copied", out=out, now=lambda clock=clock: clock[0]) as line:
            for done in range(0, 301):
                clock[0] = done / (64 if live else 8)
                line(done * 1000, 300_000)
        text = out.getvalue()
        assert text.count("copied") == wanted and text.endswith("\n") and text.count("\r") == wanted * live


