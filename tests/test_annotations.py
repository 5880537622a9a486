"""Annotation files as published: the byte index, what is no row, and rows that cannot be used."""

import json
import pickle

import numpy as np
import pytest

from svlm_jax.data import annotations
from svlm_jax.data.annotations import AnnotationFile, UnusableRow, annotation_row, parse_annotation
from svlm_jax.errors import UserError


def row(video="a.mp4", start=0, end=4, words=((0, 0.5, "one"), (0.5, 3, "two")), **said):
    clip = {"type": "video", "video": video, "video_start": start, "video_end": end}
    asked = {"type": "text", "text": "Comment", "previous": "before", "title": "Ein Spiel"}
    content = {"type": "text_stream", "text_stream": [list(word) for word in words], **said}
    return [{"role": "user", "content": [clip, asked]}, {"role": "assistant", "content": [content]}]


def write(path, rows, *, tail=(), ascii=False, newline="\n"):
    lines = [json.dumps(each, ensure_ascii=ascii) for each in rows] + [json.dumps(each) for each in tail]
    path.write_bytes((newline.join(lines) + newline).encode())
    return path


ROWS = [row(f"{i}.mp4", words=[(0, 1, "进球了" * i), (1, 2, "😀 gol")]) for i in range(7)]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("tail", [(), ([0, 812, 1650],), ([],)])
def test_every_row_is_found_whatever_the_script(tmp_path, newline, ascii, tail):
    file = AnnotationFile(write(tmp_path / "a.jsonl", ROWS, tail=tail, ascii=ascii, newline=newline))
    assert len(file) == len(ROWS)
    assert [json.loads(line) for line in file] == ROWS
    assert file.annotation(3).words[0].text == "进球了" * 3


def test_the_published_side_file_is_left_alone(tmp_path):
    """StreamingVLM's offsets count characters, so they are wrong for bytes: reading them would give other rows."""
    path = write(tmp_path / "clips_with_seeks.jsonl", ROWS)
    (tmp_path / "clips_seeks.jsonl").write_text("[0, 7, 14]")
    assert len(AnnotationFile(path)) == len(ROWS)
    assert (tmp_path / "clips_seeks.jsonl").read_text() == "[0, 7, 14]"
    with pytest.raises(UserError, match="an index that goes with another file"):
        AnnotationFile(tmp_path / "clips_seeks.jsonl")


def test_a_byte_order_mark_and_a_missing_last_newline(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(annotations.MARK + "\n".join(json.dumps(each) for each in ROWS).encode())
    assert [json.loads(line) for line in AnnotationFile(path)] == ROWS


def test_the_index_is_kept_and_made_anew_when_the_file_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", ROWS)
    AnnotationFile(path)
    side = path.with_name(path.name + annotations.INDEX_SUFFIX)
    assert side.is_file() and [entry.name for entry in tmp_path.iterdir() if entry.suffix == ".part"] == []
    with monkeypatch.context() as patch:
        patch.setattr(annotations, "build_index", lambda path: pytest.fail("built again"))
        assert [json.loads(line) for line in AnnotationFile(path)] == ROWS
    write(path, ROWS[:2])
    assert len(AnnotationFile(path)) == 2
    side.write_bytes(b"no zip file")
    assert len(AnnotationFile(path)) == 2


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", ROWS)

    def refuse(**_):
        raise PermissionError("read-only")

    monkeypatch.setattr(annotations.tempfile, "mkstemp", refuse)
    assert len(AnnotationFile(path)) == len(ROWS)
    assert len(list(tmp_path.iterdir())) == 1


def test_doubled_rows_are_told_from_the_first(tmp_path):
    file = AnnotationFile(write(tmp_path / "a.jsonl", [ROWS[0], ROWS[1], ROWS[0]]))
    assert file.annotation(0).video == "0.mp4"
    with pytest.raises(UnusableRow, match="doubled: the same as row 0") as error:
        file.annotation(2)
    assert error.value.reason == "doubled"


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="no such annotation file"):
        AnnotationFile(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match="holds no row"):
        AnnotationFile(tmp_path / "empty.jsonl")


def test_a_row_is_read_and_written_alike():
    line = json.dumps(row(qa_stream=[[0, 2.5, "Who?", "He."]]))
    annotation = parse_annotation(line)
    assert (annotation.video, annotation.start, annotation.end, annotation.previous) == ("a.mp4", 0, 4, "before")
    assert annotation.words[1] == (0.5, 3, "two") and annotation.questions[0].asked == 2.5
    assert annotation.other == (("title", "Ein Spiel"),)
    assert annotation_row(annotation) == json.loads(line)


def without(path):
    made = row()
    part = made
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    return made


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{broken", "broken JSON"),
        ("[" * 100_000, "broken JSON"),
        ("3", "not a streaming row"),
        (json.dumps(row()[:1]), "not a streaming row"),
        (json.dumps(without([0, "content", 0, "video_end"])), "not a streaming row"),
        (json.dumps(without([1, "content", 0, "text_stream"])), "not a streaming row"),
        (json.dumps(row(words=[(0, 1)])), "not a streaming row"),
        (json.dumps(row(words=[(0, "1", "a")])), "not a streaming row"),
        (json.dumps(row(words=[(0, 1, None)])), "not a streaming row"),
        (json.dumps(row(start=float("nan"))), "not a streaming row"),
        (json.dumps(row(end=10**400)), "not a streaming row"),
        (json.dumps(row(start=4, end=4)), "impossible times"),
        (json.dumps(row(start=-1)), "impossible times"),
        (json.dumps(row(qa_stream=[[0, 1, "Who?"]])), "not a streaming row"),
    ],
)
def test_unusable_rows_say_why(line, reason):
    with pytest.raises(UnusableRow) as error:
        parse_annotation(line)
    assert error.value.reason == reason and str(error.value).startswith(reason)
    again = pickle.loads(pickle.dumps(error.value))
    assert (again.reason, str(again)) == (reason, str(error.value))


def test_the_index_counts_bytes(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    index, data = annotations.build_index(path), path.read_bytes()
    lines = [data[start : start + size] for start, size in zip(index.starts, index.sizes, strict=True)]
    assert lines == data.splitlines() and index.starts.dtype == np.int64
