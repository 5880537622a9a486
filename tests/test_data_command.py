"""`svlm data`: what it prints and writes, and one clear line for whatever is wrong."""

import base64
import io
import json
import re
import shutil
import sys

import pytest
import small
from PIL import Image

from svlm_jax import cli
from svlm_jax.config import VisionConfig
from svlm_jax.data.annotations import INDEX_SUFFIX, AnnotationFile, UnusableRow
from svlm_jax.data.loader import LoaderConfig
from svlm_jax.data.packing import RowShape
from svlm_jax.data.pipeline import DataConfig, DatasetConfig, Workers, make_batches
from svlm_jax.data.records import open_records
from svlm_jax.data.statistics import plot, survey
from svlm_jax.demo.clip import sample_path
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.errors import UserError

CLIP = str(sample_path())


def row(video=CLIP, start=0.0, end=4.0, words=(("进球", 1.0), ("<b>red", 3.2)), **changes):
    clip = {"type": "video", "video": video, "video_start": start, "video_end": end}
    asked = {"type": "text", "text": "Who?", "previous": changes.get("previous", "Kick-off."), "title": "A & B"}
    said = {"type": "text_stream", "text_stream": [[at - 0.5, at, word] for word, at in words]}
    if "qa" in changes:
        said["qa_stream"] = changes["qa"]
    return [{"role": "user", "content": [clip, asked]}, {"role": "assistant", "content": [said]}]


@pytest.fixture
def file(tmp_path):
    rows = [row(), row(start=4.0, end=8.0, words=(("goal", 5.0),), qa=[[4, 5.5, "Who scored?", "Red."]]), row(end=70.0), row("absent.mp4"), row()]
    path = tmp_path / "clips.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows) + "{broken\n[0, 10, 20]\n")
    return path


def run(capsys, *argv) -> tuple[int, str, str]:
    code = cli.run(["data", *map(str, argv)])
    out, error = capsys.readouterr()
    return code, out, error


def test_index(file, capsys):
    code, out, _ = run(capsys, "index", file)
    assert code == 0 and out == f"{file}: 6 rows, 1 of them doubled; the index is kept in {file}{INDEX_SUFFIX}\n"
    assert file.with_name(file.name + INDEX_SUFFIX).is_file()


def test_stats(file, capsys):
    code, out, _ = run(capsys, "stats", file, "--videos", file.parent)
    lines = dict(re.split(r"\s{2,}", line.strip()) for line in out.splitlines()[1:])
    assert code == 0 and lines["rows"] == "6" and lines["usable"] == "2 (33.3%)"
    assert (lines["doubled"], lines["broken JSON"], lines["clip too long"], lines["video missing"]) == ("1", "1", "1", "1")
    assert lines["hours of clips"] == "0.00" and lines["words"] == "3, 0.38 a second" and lines["silent turns"] == "62.5% of 8"
    assert lines["seconds a clip"] == "4.0 / 4.0 / 4.0" and lines["questions"] == "1" and lines["never said"] == "0 words, 0 questions"
    assert "tokens a row" not in lines
    counted = run(capsys, "stats", file, "--model", tiny_path(), "--frame", "56x28")[1]
    assert "tokens a row" in counted and "labels a row" in counted
    more = run(capsys, "stats", file, "--model", tiny_path(), "--frame", "84x28")[1]
    least, most = (int(re.search(r"tokens a row +(\d+) /", text).group(1)) for text in (counted, more))
    assert most - least == 4  # a column of tokens more in each turn
    assert run(capsys, "stats", file, "--max-seconds", 80)[1].count("video missing") == 0


def test_sizes_are_those_of_the_model(file, tmp_path, capsys):
    """One with patches of 16 pixels sees 64x32 pixels as two tokens, 84x28 not at all; pages show frames of its sizes."""
    model = tmp_path / "model"
    shutil.copytree(tiny_path(), model)
    described = json.loads((model / "config.json").read_text())
    described["vision_config"] |= {"patch_size": 16, "window_size": 128}
    (model / "config.json").write_text(json.dumps(described))
    least, most = (run(capsys, "stats", file, "--model", model, "--frame", frame)[1] for frame in ("64x32", "96x32"))
    least, most = (int(re.search(r"tokens a row +(\d+) /", text).group(1)) for text in (least, most))
    assert most - least == 4
    page = tmp_path / "page.html"
    assert run(capsys, "show", file, "--out", page, "--model", model, "--max-pixels", 9408)[0] == 0
    pictures = re.findall(r'<img [^>]*base64,([^"]+)"', page.read_text(encoding="utf-8"))
    sizes = {Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in pictures}
    assert sizes and all(side % 32 == 0 for size in sizes for side in size)


def test_plots(file, tmp_path, capsys, monkeypatch):
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        pass
    else:
        assert run(capsys, "stats", file, "--plots", tmp_path / "plots")[0] == 0
        assert (tmp_path / "plots" / "clips.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, error = run(capsys, "stats", file, "--plots", tmp_path / "plots")
    assert code == 1 and error.startswith("svlm: plots need matplotlib") and error.count("\n") == 1


def test_nothing_to_plot(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{\n")
    found = survey(AnnotationFile(tmp_path / "bad.jsonl"), LoaderConfig().sample, 64.0)
    with pytest.raises(UserError, match="nothing to plot"):
        plot(found, "bad.jsonl", tmp_path / "bad.png")


@pytest.mark.parametrize("layout", ["published", "streaming"])
def test_show(file, tmp_path, capsys, layout):
    page = tmp_path / "new" / "page.html"
    code, out, _ = run(capsys, "show", file, "--row", 1, "--out", page, "--layout", layout, "--max-pixels", 9408)
    text = page.read_text(encoding="utf-8")
    assert code == 0 and "of them labels" in out
    assert text.count("<img") == 8 and text.count('class="turn"') == 5  # two frames a second, four turns and what is before them
    assert text.count('class="token vision"') == 4 and "A &amp; B" in text
    said = re.findall(r'class="token label" title="\d+">([^<]*)<', text)
    assert said.count(" ...") == said.count("&lt;|im_end|&gt;") == 4 and "goal" in "".join(said) and "Red" in "".join(said)
    plain = "".join(re.findall(r'class="token" title="\d+">([^<]*)<', text))
    assert "Who scored?" in plain and ("Who?" in plain) == (layout == "streaming")


def test_show_hides_no_markup_of_the_data(file, tmp_path, capsys):
    run(capsys, "show", file, "--out", tmp_path / "page.html", "--max-pixels", 9408)
    assert "<b>" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_chunk(tmp_path, capsys):
    long = tmp_path / "long.jsonl"
    words = [(f"w{at}\ud83d", float(at)) for at in range(1, 13)]  # half a surrogate pair, which JSON lets through
    long.write_text(json.dumps(row(end=12.0, words=words)) + "\n{broken\n")
    out = tmp_path / "new" / "chunks.jsonl"
    code, said, _ = run(capsys, "chunk", long, "--window", 6, "--overlap", 3, "--out", out)
    assert code == 0 and "row 1 is left out: broken JSON" in said and "3 chunks of 6 s that share 3 s, of 1 clips; 1 left out" in said
    chunks = [AnnotationFile(out).annotation(row) for row in range(3)]
    assert [(chunk.start, chunk.end, len(chunk.words)) for chunk in chunks] == [(0, 6, 6), (3, 9, 6), (6, 12, 6)]
    assert chunks[1].previous == "Kick-off. w1\ud83d w2\ud83d w3\ud83d" and chunks[1].other == (("title", "A & B"),)
    assert [path.name for path in out.parent.iterdir() if path.suffix == ".part"] == []


def test_convert_and_train_on_what_was_converted(file, tmp_path, capsys):
    target = tmp_path / "clips.array_record"
    code, out, _ = run(capsys, "convert", file, "--out", target)
    assert code == 0 and out.startswith(f"{target}: 4 rows; 1 left out: ") and "doubled" in out and "broken JSON" in out
    rows = AnnotationFile(file)
    assert [open_records(target)[i] for i in range(4)] == [rows[i] for i in range(4)]

    vision = VisionConfig(depth=0, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, fullatt_block_indexes=())
    seen = []
    for path in (file, target):
        loader, shape = LoaderConfig(max_pixels=28 * 56), RowShape(300, 4, 2)
        config = DataConfig({"a": DatasetConfig(str(path))}, loader, shape, rows=1, lanes=1, epochs=1, shuffle=False)
        seen.append(list(iter(make_batches(config, small.tokenizer(), vision, workers=Workers(threads=0, batches_ahead=0)))))
    assert [rows.samples for rows in seen[0]] == [rows.samples for rows in seen[1]]
    for ours, theirs in zip(*seen, strict=True):
        assert (ours.batch.tokens == theirs.batch.tokens).all() and (ours.batch.patches == theirs.batch.patches).all()
    assert seen[0][-1].skipped == {**seen[1][-1].skipped, "a: doubled": 1, "a: broken JSON": 1}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["index", "absent.jsonl"], "absent.jsonl: there is no such annotation file"),
        (["show", "{file}", "--row", "9", "--out", "x.html"], "rows 0 to 5, and no row 9"),
        (["show", "{file}", "--row", "3", "--out", "x.html"], "video missing: absent.mp4"),
        (["chunk", "{file}", "--out", "{file}"], "is one of the files to be cut"),
        (["chunk", "{file}", "--overlap", "24", "--out", "x.jsonl"], "shorter than the window"),
        (["convert", "{file}", "--out", "x.jsonl"], "name the file .array_record"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(file, capsys, argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run(capsys, *(word.format(file=file) for word in argv))
    assert code == 1 and message in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix not in (".npz", ".jsonl")) == []


def test_records_that_are_none(tmp_path):
    with pytest.raises(UserError, match="make it with svlm data convert"):
        open_records(tmp_path / "absent.array_record")
    (tmp_path / "bad.array_record").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="cannot be read"):
        open_records(tmp_path / "bad.array_record")


def test_without_the_library_records_say_what_to_install(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_module", None)
    monkeypatch.setitem(sys.modules, "grain.sources", None)
    code, _, error = run(capsys, "convert", file, "--out", tmp_path / "clips.array_record")
    assert code == 1 and error == "svlm: ArrayRecord files need grain and array_record: pip install 'svlm-jax[train]'\n"
    with pytest.raises(UserError, match="need grain"):
        open_records(tmp_path / "clips.array_record")


def test_a_row_that_cannot_be_used_is_a_mistake_that_the_user_can_mend():
    assert issubclass(UnusableRow, UserError)
