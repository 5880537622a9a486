"""What an annotation file says about a video, to be shown beside captions."""

import bisect
from pathlib import Path

from svlm_jax.data.annotations import Annotation, AnnotationFile, Question, UnusableRow, Word
from svlm_jax.errors import UserError


class Truth:
    """The annotated words of one video, by time."""

    def __init__(self, words: list[Word], questions: list[Question]):
        self._words, self._questions = sorted(words), questions
        self._starts = [word.start for word in self._words]

    @classmethod
    def beside(cls, video: str, path: str = "") -> "Truth":
        """From `path`, or else from VIDEO.jsonl: all rows that are about this video. UserError where there is none."""
        if not path and "://" in video:
            raise UserError(f"--truth: no file lies beside {video}: name one with --truth FILE.jsonl")
        file = AnnotationFile(path or Path(video).with_suffix(".jsonl"), keep_index=False)
        rows: list[Annotation] = []
        for number in range(len(file)):
            try:
                row = file.annotation(number)
            except UnusableRow as error:
                raise UserError(f"{file.path}, row {number}: {error}") from None
            if Path(row.video).name == Path(video).name:
                rows.append(row)
        if not rows:
            raise UserError(f"{file.path} says nothing about {Path(video).name}: name another file with --truth FILE.jsonl")
        words = dict.fromkeys(word for row in rows for word in row.words)  # chunks overlap
        return cls(list(words), list(dict.fromkeys(question for row in rows for question in row.questions)))

    def said(self, start: float, end: float) -> str:
        """What is said from `start` to before `end`, in seconds: answers to the file's own questions, then words."""
        answers = [question.answer.strip() for question in self._questions if start <= question.asked < end]
        words = [word.text for word in self._words[bisect.bisect_left(self._starts, start) : bisect.bisect_left(self._starts, end)]]
        return " ".join([*answers, *words])
