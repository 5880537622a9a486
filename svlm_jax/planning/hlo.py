"""What a compiled program sends between chips, read from its text.

A collective inside a loop counts once a turn, one in a branch of a condition once: it may be taken every time or never. A fusion
that reduces and scatters is told from one that reduces only, and the pieces that the compiler cuts a collective into, which share a channel,
count as one.
"""

import collections
import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32}
BITS |= {"s64": 64, "u64": 64, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8}
_HEAD = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\)\s*->\s*.*\{\s*$")
_OPERATION = re.compile(r"\s([a-z][a-z0-9\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_REFERENCES = "calls|to_apply|body|condition|called_computations|true_computation|false_computation|branch_computations"
_CALLED = re.compile(rf"(?:{_REFERENCES})=\{{?(%[\w.\-]+(?:,\s*%[\w.\-]+)*)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of a kind."""

    kind: str
    count: int  # operations of one run of the program
    moved: float  # bytes that each chip sends, where the links form rings: the least that is possible


@dataclasses.dataclass
class _Found:
    kind: str
    moved: float
    times: float


def collectives(text: str, chips: int) -> list[Collective]:
    """By kind, those that send most first. `text` is `Compiled.as_text()`, `chips` the devices of the program."""
    computations, entry = _computations(text)
    times: dict[str, float] = collections.defaultdict(float)
    _count(entry, 1.0, computations, times, frozenset())
    found: dict[str, _Found] = {}
    for name, lines in computations.items():
        if not times[name]:
            continue
        scattered = name.startswith("all-reduce-scatter")
        for line in lines:
            kind, _ = _operation(line)
            kind = kind.removesuffix("-start")
            if kind not in KINDS:
                continue
            size = _group(line, chips)
            kind = "reduce-scatter" if scattered and kind == "all-reduce" else kind
            channel = re.search(r"channel_id=(\d+)", line)
            key = channel[1] if channel else f"{name} {line[:80]}"
            moved = _moved(kind, line, size, whole=scattered)
            if size > 1 and (key not in found or found[key].times < times[name]):
                found[key] = _Found(kind, moved, times[name])
    totals: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for one in found.values():
        totals[one.kind][0] += one.times
        totals[one.kind][1] += one.times * one.moved
    out = [Collective(kind, round(count), moved) for kind, (count, moved) in totals.items()]
    return sorted(out, key=lambda each: -each.moved)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """(lines by computation, the entry's name)."""
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        head = _HEAD.match(line) if not line.startswith(" ") else None
        if head:
            lines = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif " = " in line:
            lines.append(line)
    return found, entry


def _operation(line: str) -> tuple[str, int]:
    """(the operation of an instruction, where its name begins): behind the type of its result."""
    found = _OPERATION.search(line, line.index(" = ") + 2)
    return (found[1], found.start(1)) if found else ("", len(line))


def _count(name: str, times: float, computations: dict[str, list[str]], total: dict[str, float], above: frozenset[str]) -> None:
    """Adds how often each computation runs when `name` runs `times` times."""
    total[name] += times
    for line in computations.get(name, ()):
        called = [one.strip().lstrip("%") for group in _CALLED.findall(line) for one in group.split(",")]
        if not called:
            continue
        kind, _ = _operation(line)
        inner = 1.0 if kind == "conditional" else times * _turns(line, computations) if kind == "while" else times
        for one in called:
            if one not in above:
                _count(one, inner, computations, total, above | {name})


def _turns(line: str, computations: dict[str, list[str]]) -> int:
    """Turns of a loop: as the compiler states them, or the number that the loop's condition counts up to; else 1."""
    if stated := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(stated[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    limits = [int(n) for one in lines for n in re.findall(r"[su](?:32|64)\[\]\S* constant\((\d+)\)", one)]
    return limits[0] if len(limits) == 1 else 1


def _group(line: str, chips: int) -> int:
    """Chips that take part in a collective."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return found[1].count(",") + 1
    return chips


def _bytes(text: str) -> list[float]:
    return [BITS[kind] / 8 * math.prod(map(int, filter(None, shape.split(",")))) for kind, shape in _SHAPE.findall(text) if kind in BITS]


def _moved(kind: str, line: str, size: int, *, whole: bool) -> float:
    """Bytes that a chip sends of one collective among `size` chips."""
    begin = line.index(" = ")
    operation, at = _operation(line)
    result = _bytes(line[begin:at])
    share = (size - 1) / size
    if operation.endswith("-start") and len(result) > 1:
        # The result lists what goes in, then what comes out: parts of a whole, or the whole
        if kind == "all-gather":
            result = [sum(result) * size / (size + 1)]
        elif kind == "reduce-scatter":
            result = [sum(result) / (size + 1)]
        elif kind == "collective-permute":
            result = [max(result)]
    total = sum(result)
    if kind == "all-reduce":
        return 2 * share * total
    if kind == "reduce-scatter" and not whole:
        return (size - 1) * total  # the result is one part
    if kind == "collective-permute":
        return total
    return share * total
