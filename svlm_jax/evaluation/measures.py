"""What can be counted without a judge, wherever there is a reference: names, pace, repetition, silence, delay.

`names` says what counts as a name. No language model is asked, so the same texts always give the same numbers.
"""

import bisect
import dataclasses
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from svlm_jax.evaluation.inf_streams import Game, Piece, Result, Segment, covers

SLACK = 10.0  # seconds before and after a segment in which a name that the segment's reference has may be said as well
RUN = 4  # words of a repeated phrase
RECENT = 60.0  # seconds that a phrase is remembered for
NOT_NAMES = frozenset(["I", "I'm", "I'll", "I've", "I'd", "Oh", "Ah", "OK", "Okay", "Yeah", "Yes", "No", "Mr", "Mrs", "Ms", "Dr"])

_WORD = re.compile(r"[^\W_]+(?:['’.-][^\W_]+)*")
_SENTENCE = re.compile(r"[.!?:;…\"“”]")  # between two words: the second one begins a sentence


def words(text: str) -> list[str]:
    """Its words, as written; numbers are words, punctuation is none."""
    return _WORD.findall(text)


def names(texts: Iterable[str]) -> Counter[str]:
    """Names in texts, with their possessive ending taken off, and how often each is said.

    A word counts where it has a capital first letter and stands inside a sentence; where it begins one, only if it stands inside
    another one too. Words that are written small elsewhere in the texts are no names, and neither are `NOT_NAMES` and single letters.
    """
    inside: Counter[str] = Counter()
    leading: Counter[str] = Counter()
    small: set[str] = set()
    for text in texts:
        before = 0  # where the last word ended
        for match in _WORD.finditer(text):
            word, gap, first = _bare(match[0]), text[before : match.start()], before == 0
            before = match.end()
            if not word[:1].isupper():
                small.add(word.lower())
            elif len(word) > 1 and word not in NOT_NAMES:
                (leading if first or _SENTENCE.search(gap) else inside)[word] += 1
    return Counter({word: count + leading[word] for word, count in inside.items() if word.lower() not in small})


def _bare(word: str) -> str:
    return word[:-2] if word.endswith(("'s", "’s")) else word


def mentions(texts: Iterable[str], known: Iterable[str]) -> Counter[str]:
    """How often each of the known names is said, however it is written there."""
    asked = {name.lower(): name for name in known}
    return Counter(asked[word] for text in texts for found in words(text) if (word := _bare(found).lower()) in asked)


@dataclasses.dataclass(frozen=True)
class Measures:
    """Of one contestant, over all of its videos or a part of the stream. Shares are 0 to 1; None where nothing can be said."""

    seconds: float
    words_a_second: float | None
    silence: float | None  # share of the time that items without words, or none, cover
    coverage: float | None  # share of the names in the reference's segments that are said there
    invented: float | None  # share of the mentions of names whose name neither the video's reference nor its title has
    repetition: float | None  # share of 4-word phrases that were said already in the last minute
    delay: float | None  # seconds, median: from a name's first mention in the reference to its first one here
    delays: int  # names that the median is of


@dataclasses.dataclass
class _Counts:
    """Sums that any parts of the stream can be added up from."""

    seconds: float = 0.0
    words: float = 0.0  # those of an item that lies in several parts are spread evenly over its time
    spoken: float = 0.0
    covered: int = 0
    wanted: int = 0
    invented: int = 0
    named: int = 0
    repeated: int = 0
    phrases: int = 0
    delays: list[float] = dataclasses.field(default_factory=list)

    def add(self, other: "_Counts") -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def measures(self) -> Measures:
        def share(part: float, whole: float) -> float | None:
            return part / whole if whole else None

        return Measures(
            seconds=self.seconds,
            words_a_second=share(self.words, self.seconds),
            silence=None if not self.seconds else max(0.0, 1 - self.spoken / self.seconds),
            coverage=share(self.covered, self.wanted),
            invented=share(self.invented, self.named),
            repetition=share(self.repeated, self.phrases),
            delay=statistics.median(self.delays) if self.delays else None,
            delays=len(self.delays),
        )


def measure(
    games: Sequence[Game], segments: Sequence[Segment], results: Mapping[str, Result], starts: Mapping[str, float], bins: int = 20
) -> tuple[Measures, list[Measures]]:
    """Over everything, and over `bins` equal parts of each video from its start to where its reference ends, all videos' parts together."""
    parts = [_Counts() for _ in range(bins)]
    for game in games:
        result, start = results.get(game.name), starts[game.name]
        if result is not None and game.end > start:
            for part, counts in zip(parts, _video(game, segments, result, start, bins), strict=True):
                part.add(counts)
    whole = _Counts()
    for part in parts:
        whole.add(part)
    return whole.measures(), [part.measures() for part in parts]


def _video(game: Game, segments: Sequence[Segment], result: Result, start: float, bins: int) -> list[_Counts]:
    stop = min(float(game.end), result.end)
    items = [item for item in result.items if start < item.end and item.start < stop]
    width = (game.end - start) / bins
    counts = [_Counts() for _ in range(bins)]

    def part(time: float) -> _Counts:
        return counts[min(bins - 1, max(0, int((time - start) / width)))]

    def shares(begin: float, end: float) -> list[float]:
        """Seconds of a stretch that lie in each part."""
        begin, end = max(begin, start), min(end, stop)
        edges = (start + number * width for number in range(bins))
        return [max(0.0, min(end, edge + width) - max(begin, edge)) for edge in edges]

    for span in result.spans():
        for each, seconds in zip(counts, shares(*span), strict=True):
            each.seconds += seconds
    spoken = [item for item in items if item.text]
    for item in spoken:
        said = shares(item.start, item.end)
        if total := sum(said):
            for each, seconds in zip(counts, said, strict=True):
                each.words += len(words(item.text)) * (seconds / total)
        else:
            part(item.start).words += len(words(item.text))
    for begin, end in _union(spoken):
        for each, seconds in zip(counts, shares(max(begin, result.start), end), strict=True):
            each.spoken += seconds
    _count_names(game, segments, result, spoken, start, part)
    _count_phrases(spoken, part)
    return counts


def _union(items: Sequence[Piece]) -> list[tuple[float, float]]:
    """Stretches of time that some item covers."""
    joined: list[tuple[float, float]] = []
    for begin, end, _ in sorted(items):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined


def _count_names(game: Game, segments: Sequence[Segment], result: Result, spoken: Sequence[Piece], start: float, part) -> None:
    known = names([" ".join(piece.text for piece in game.said)])
    ends = [item.end for item in spoken]
    for segment in segments:
        if segment.video == game.name and covers(result, segment):
            counts = part((segment.start + segment.end) / 2)
            wanted = mentions([segment.reference], known)
            near = spoken[bisect.bisect_right(ends, segment.start - SLACK) : bisect.bisect_right(ends, segment.end + SLACK)]
            counts.wanted += len(wanted)
            counts.covered += len(mentions((item.text for item in near), wanted))
    allowed = {_bare(word).lower() for text in (game.title, *(piece.text for piece in game.said)) for word in words(text)}
    said = names([" ".join(item.text for item in spoken)])
    for item in spoken:
        for name, count in mentions([item.text], said).items():
            part(item.start).named += count
            part(item.start).invented += count * (name.lower() not in allowed)
    first: dict[str, float] = {}
    for item in spoken:
        for name in mentions([item.text], known):
            first.setdefault(name, item.end)
    for piece in game.said:
        if piece.end > start:
            for name in list(mentions([piece.text], first)):
                when = first.pop(name)  # of each name the first time alone
                part(piece.start).delays.append(when - piece.start)


def _count_phrases(spoken: Sequence[Piece], part) -> None:
    stream = [(word.lower(), item.start) for item in spoken for word in words(item.text)]
    last: dict[tuple[str, ...], float] = {}
    for i in range(len(stream) - RUN + 1):
        phrase, when = tuple(word for word, _ in stream[i : i + RUN]), stream[i + RUN - 1][1]
        counts = part(when)
        counts.phrases += 1
        counts.repeated += phrase in last and when - last[phrase] <= RECENT
        last[phrase] = when
