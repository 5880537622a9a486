"""A match as files: real video in H.264, and its commentary in the format that training data have."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction

import av
from av.video.reformatter import VideoReformatter

from svlm_jax.data.annotations import Annotation, Question, Word, annotation_row
from svlm_jax.data.chunks import ChunkConfig, chunk_times
from svlm_jax.data.video import ONE_THREAD
from svlm_jax.demo.commentary import QUERY, Line
from svlm_jax.demo.match import Match
from svlm_jax.demo.picture import HEIGHT, WIDTH, Painter
from svlm_jax.errors import UserError
from svlm_jax.files import whole_file

KEYFRAME_SECONDS = 4  # between pictures that a reader can start at


@dataclasses.dataclass(frozen=True)
class FilmConfig:
    """How a match is filmed."""

    fps: int = 12
    height: int = HEIGHT
    width: int = WIDTH
    quality: int = 24  # x264's constant rate factor: less is better
    preset: str = "veryfast"
    tune: str = ""  # x264's, such as fastdecode,zerolatency
    start: float = 0.0  # seconds of the match before the video's first picture

    def __post_init__(self):
        if self.fps < 1 or min(self.height, self.width) < 112 or self.height % 2 or self.width % 2:
            raise UserError(f"a film of {self.width}x{self.height} at {self.fps} fps: at least 1 fps, and even sides of at least 112 pixels")
        if not 0 <= self.quality <= 51:
            raise UserError(f"quality must be from 0 (best) to 51, not {self.quality}")


Progress = Callable[[float, float], None]  # seconds done, seconds in total


def write_video(match: Match, path: str | os.PathLike, config: FilmConfig | None = None, progress: Progress | None = None) -> None:
    """Films the match from `config.start` to its end, into an MP4 whose header comes first."""
    c = config or FilmConfig()
    painter = Painter(match, c.height, c.width)
    converter = VideoReformatter()
    options = {"crf": str(c.quality), "preset": c.preset, "g": str(KEYFRAME_SECONDS * c.fps), "threads": "1"} | ({"tune": c.tune} if c.tune else {})
    with whole_file(path) as part, av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=c.fps, options=options)
        stream.height, stream.width, stream.pix_fmt = c.height, c.width, "yuv420p"
        for number in range(math.ceil((match.seconds - c.start) * c.fps)):
            picture = av.VideoFrame.from_ndarray(painter(c.start + number / c.fps), format="rgb24")
            frame = converter.reformat(picture, format="yuv420p", **ONE_THREAD)
            frame.pts, frame.time_base = number, Fraction(1, c.fps)
            container.mux(stream.encode(frame))
            if progress and number % c.fps == 0:
                progress(number / c.fps, match.seconds - c.start)
        container.mux(stream.encode(None))


def word_times(line: Line, index: int) -> list[Word]:
    """The words of a round with their times, one after the other within it."""
    words = line.words.split()
    return [Word(round(index + 0.9 * i / len(words), 3), round(index + 0.9 * (i + 1) / len(words), 3), word) for i, word in enumerate(words)]


def annotate(video: str, seconds: float, lines: Mapping[int, Line]) -> Annotation:
    """The whole match as one annotation."""
    words = [word for index, line in sorted(lines.items()) for word in word_times(line, index)]
    return Annotation(video, 0.0, seconds, QUERY, "", tuple(words), _questions(lines, 0, math.ceil(seconds)))


def _questions(lines: Mapping[int, Line], first: int, end: int) -> tuple[Question, ...]:
    asked = ((index, lines[index]) for index in range(first, end) if index in lines and lines[index].question)
    return tuple(Question(float(index), index + 0.5, line.question, " " + line.answer) for index, line in asked)


def spoken(line: Line) -> str:
    """What a round adds to the memory of words."""
    return (f" {line.answer}\n" if line.question else "") + (f" {line.words}" if line.sentences else "")


def chunk(video: str, first: int, end: int, lines: Mapping[int, Line], *, memory: tuple[int, int]) -> Annotation:
    """The seconds from `first` to `end` of a match. The previous text is what the model itself would have said before, answers too.

    `memory`: so many first and so many last words of it are kept, at least; rows cut them further by tokens.
    """
    said = [spoken(lines[index]) for index in sorted(lines) if index < first]
    words = tuple(word for index in range(first, end) if index in lines for word in word_times(lines[index], index))
    return Annotation(video, float(first), float(end), QUERY if not first else "", _ends(said, memory), words, _questions(lines, first, end))


def chunks(video: str, seconds: float, lines: Mapping[int, Line], config: ChunkConfig, *, memory: tuple[int, int]) -> Iterator[Annotation]:
    """Overlapping chunks of a match of whole seconds, each as `chunk` cuts it."""
    return (chunk(video, round(start), round(end), lines, memory=memory) for start, end in chunk_times(0.0, seconds, config))


def _ends(said: Sequence[str], memory: tuple[int, int]) -> str:
    """The first rounds with `memory[0]` words and the last ones with `memory[1]`."""
    counts = [len(text.split()) for text in said]
    if sum(counts) <= sum(memory):
        return "".join(said)
    head = tail = 0
    begin, end = 0, len(said)
    while head < memory[0]:
        head += counts[begin]
        begin += 1
    while tail < memory[1] and end > begin:
        end -= 1
        tail += counts[end]
    return "".join((*said[:begin], *said[end:]))


def write_annotations(annotations: Sequence[Annotation] | Iterator[Annotation], path: str | os.PathLike) -> int:
    """One row a line, as published; how many."""
    count = 0
    with whole_file(path) as part, part.open("w", encoding="utf-8") as file:
        for annotation in annotations:
            file.write(json.dumps(annotation_row(annotation)) + "\n")
            count += 1
    return count
