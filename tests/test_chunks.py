"""Chunks cover a video, share what they should, and lose no word."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svlm_jax.data.annotations import Annotation, Question, Word
from svlm_jax.data.chunks import ChunkConfig, chunk_times, make_chunks
from svlm_jax.data.samples import SampleConfig, make_script
from svlm_jax.errors import UserError


def spoken(chunk: Annotation) -> list[str]:
    return " ".join(turn.words for turn in make_script(chunk, SampleConfig()).turns).split()


@st.composite
def videos(draw):
    start = draw(st.sampled_from([0.0, 16.8, 0.1, 3599.5]))
    length = draw(st.one_of(st.integers(1, 2000).map(lambda n: n / 10), st.floats(0.5, 200)))
    ends = draw(st.lists(st.floats(-3, length + 3), max_size=60))
    if draw(st.booleans()):
        ends.sort()
    overlap = draw(st.integers(0, 11))
    return start, start + length, ends, draw(st.integers(overlap + 1, 24)), overlap


@settings(max_examples=150, deadline=None)
@given(videos())
def test_no_word_is_lost_and_the_overlap_is_as_stated(video):
    start, end, ends, window, overlap = video
    words = tuple(Word(start + at - 0.1, start + at, f"w{i}") for i, at in enumerate(ends))
    names = [word.text for word in words]
    whole = Annotation("a.mp4", start, end, "Comment", "before it", words)
    config = ChunkConfig(float(window), float(overlap))
    chunks = list(make_chunks(whole, config))

    # the video is covered, and each chunk shares the overlap with the next
    assert chunks[0].start == start and end - 1e-6 <= chunks[-1].end < end + 1
    for now, after in itertools.pairwise(chunks):
        assert now.end - after.start == pytest.approx(overlap) and now.end - now.start == pytest.approx(window)
        assert after.end > now.end
    assert chunks[-1].end - chunks[-1].start <= window + 1e-6

    # what a chunk's turns say follows what its previous text ends with; all of it together is all there is
    covered = 0
    for chunk in chunks:
        head, said = chunk.previous.split(), spoken(chunk)
        assert head[:2] == ["before", "it"]
        first = len(head) - 2
        assert head[2:] + said == names[: first + len(said)] and first <= covered
        assert said == [word.text for word in chunk.words]
        covered = first + len(said)
    assert covered == len(words)


def test_words_go_to_the_chunks_that_hold_their_end():
    words = tuple(Word(at - 0.5, float(at), f"w{at}") for at in range(1, 37))
    chunks = list(make_chunks(Annotation("a.mp4", 0.0, 36.0, "", "", words), ChunkConfig()))
    assert [(chunk.start, chunk.end) for chunk in chunks] == [(0, 24), (12, 36)]
    assert [word.text for word in chunks[0].words] == [f"w{at}" for at in range(1, 25)]
    assert chunks[1].previous == " ".join(f"w{at}" for at in range(1, 13))
    assert [word.text for word in chunks[1].words] == [f"w{at}" for at in range(13, 37)]


def test_questions_go_to_every_chunk_that_covers_them():
    asked = (Question(0, 5.0, "Who?", "He."), Question(0, 20.0, "And now?", "She."), Question(0, 99.0, "Late?", "Yes."))
    chunks = list(make_chunks(Annotation("a.mp4", 0.0, 36.0, "", "", (), asked), ChunkConfig()))
    assert [[question.question for question in chunk.questions] for chunk in chunks] == [["Who?", "And now?"], ["And now?", "Late?"]]
    assert [make_script(chunk, SampleConfig()).questions_left for chunk in chunks] == [0, 0]


@pytest.mark.parametrize("end, count", [(0.4, 1), (24, 1), (24.5, 2), (36, 2), (36.1, 3), (3600, 299)])
def test_how_many_chunks_a_video_has(end, count):
    assert len(chunk_times(0, end, ChunkConfig())) == count


@pytest.mark.parametrize("window, overlap, message", [(24, 24, "shorter than the window"), (24, -1, "shorter"), (24.5, 12, "whole number of turns")])
def test_windows_that_cannot_be(window, overlap, message):
    with pytest.raises(UserError, match=message):
        ChunkConfig(window, overlap)
