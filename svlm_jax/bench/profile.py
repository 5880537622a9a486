"""A device profile as the stages of a round.

The profiler records every kernel with the HLO instruction it stems from, the compiled program's text names the scope of every
instruction (`op_name`, which starts with the `jax.named_scope`s it was traced in), and the two together give each kernel its stage.
A stage's time is wall time on the device: a gap before a kernel counts to the kernel's stage, a gap between programs to "other".
Of a loop that is one command buffer, the profiler sees the kernels of one step only: their shares divide the whole loop's time.
"""

import collections
import contextlib
import itertools
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.profiler import ProfileData

STAGES = ("evict", "vision", "prefill", "decode")  # outer named scopes of the programs that serve
PARTS = (
    "patchify",
    "window_attention",
    "full_attention",
    "merger",
    "rotation",
    "ring_attention",
    "append",
    "attention",
    "mlp",
    "head",
    "sample",
)  # inner ones; the innermost counts
OTHER = "other"
LAST_PROGRAM = "jit_decode"  # ends a round
GRAPH_LOOP = "set_while_condition"  # XLA's kernel that ends or repeats a loop within a command buffer

Label = tuple[str, str]  # (stage, part), either may be OTHER

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OP_NAME = re.compile(r'metadata=\{[^}]*op_name="([^"]*)"')
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_NAME = re.compile(r"[\w.\-]+")


class Event(NamedTuple):
    """One kernel (or, on a CPU, one operation)."""

    start: float  # nanoseconds
    end: float
    program: str  # HLO module
    instruction: str
    run: object  # which run of the program; None where the profile does not say
    scope: str = ""  # op_name where the profile has it
    graph: bool = False  # replayed in a command buffer: then `instruction` is the kernel's name, which equal kernels share


class Round(NamedTuple):
    """One round on the device, in milliseconds."""

    stages: dict[str, float]  # of STAGES and OTHER; they sum to `total`
    parts: dict[str, float]  # "stage/part"
    total: float  # from the first kernel's start to the last one's end
    gaps: float  # of it, nothing ran, as far as can be seen


def label_of(op_name: str) -> Label:
    """The stage and the part that an operation's name puts it in: `jit(ingest)/prefill/mlp/dot_general` is ("prefill", "mlp")."""
    words = re.findall(r"\w+", re.sub(r"\bp?jit\([^)]*\)", "", op_name))
    stage = next((word for word in words if word in STAGES), OTHER)
    return stage, next((word for word in reversed(words) if word in PARTS), OTHER)


def labels(hlo: str) -> tuple[str, dict[str, Label]]:
    """(name of the module, label of each instruction) of a compiled program's text.

    An instruction without a stage of its own (a fusion, loop or command buffer that the compiler made) takes the commonest one of what it
    calls. One that has no name at all (a copy for the layout's sake) is left out: the profile's neighbours decide.
    """
    module = re.match(r"HloModule ([\w.\-]+)", hlo)
    own: dict[str, Label] = {}
    calls: dict[str, list[str]] = {}
    members: dict[str, list[str]] = collections.defaultdict(list)
    computation = ""
    for line in hlo.splitlines():
        found = _INSTRUCTION.match(line)
        if found is None:
            header = _COMPUTATION.match(line)
            computation = header[1] if header else computation
            continue
        name = found[1]
        members[computation].append(name)
        op_name = _OP_NAME.search(line)
        if op_name and "(" in op_name[1]:  # a parameter is named after the argument, without the program's jit(...)
            own[name] = label_of(op_name[1])
        called = [computation for group in _CALLED.findall(line) for computation in _NAME.findall(group)]
        if called:
            calls[name] = called

    def inside(name: str, votes: collections.Counter, seen: set[str]) -> None:
        for computation in calls.get(name, ()):
            if computation not in seen:
                seen.add(computation)
                for member in members[computation]:
                    if member in own:
                        votes[own[member]] += 1
                    inside(member, votes, seen)

    out = dict(own)
    for name in calls:
        if own.get(name, (OTHER,))[0] == OTHER:
            votes: collections.Counter[Label] = collections.Counter()
            inside(name, votes, set())
            staged = {label: count for label, count in votes.items() if label[0] != OTHER}
            if staged:
                out[name] = max(staged, key=lambda label: staged[label])
    return module[1] if module else "", out


def plain(name: str) -> str:
    """An instruction's name as a kernel's is spelled."""
    return re.sub(r"[.\-]", "_", name)


@contextlib.contextmanager
def recording(keep: str | None = None) -> Iterator[list[Event]]:
    """Profiles what runs inside; the list is filled, in order of time, when it ends. `keep`: a folder for the profile's files."""
    events: list[Event] = []
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory(prefix="svlm-profile-") as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            yield events
        for path in sorted(Path(folder).rglob("*.xplane.pb")):
            events += read(ProfileData.from_file(str(path)))
        if keep:
            shutil.copytree(folder, keep, dirs_exist_ok=True)


def read(profile: Any) -> list[Event]:
    """Of a `jax.profiler.ProfileData`, the first device's kernels, or the operations that the CPU's threads ran, in order of start."""
    planes = {plane.name: plane for plane in profile.planes}
    devices = sorted(name for name in planes if re.fullmatch(r"/device:(GPU|TPU):\d+", name))
    if not devices:
        host = planes.get("/host:CPU")
        events = [event for line in (host.lines if host else ()) for event in _events(line, "hlo_op")]
    else:
        lines = {line.name: line for line in planes[devices[0]].lines}
        streams = [name for name in lines if name.startswith("Stream")]
        if streams:
            events = [event for name in streams for event in _events(lines[name], None)]
        else:
            spans = lines["XLA Modules"].events if "XLA Modules" in lines else ()
            operations = _events(lines["XLA Ops"], None) if "XLA Ops" in lines else iter(())
            events = _placed(operations, sorted((span.start_ns, span.end_ns, span.name.split("(")[0]) for span in spans))
    return _complete(sorted(events, key=lambda event: event.start))


def _events(line, required: str | None) -> Iterator[Event]:
    """The events of a line; only those that have the required statistic. Copies between host and device belong to no program."""
    for event in line.events:
        name = event.name
        if name.startswith(("end: ", "Threadpool")):
            continue
        stats = dict(event.stats)
        if required and required not in stats:
            continue
        transfer = "hlo_module" not in stats and re.match(r"(?i)(memcpy|memset)|.*(H2D|D2H)", name)
        if transfer:
            continue
        instruction = str(stats.get("hlo_op") or (_NAME.findall(name) or [""])[0])
        graph = instruction.startswith("command_buffer")
        if graph:
            instruction = name
        scope = str(stats.get("name") or stats.get("tf_op") or "")
        start = event.start_ns
        yield Event(start, start + event.duration_ns, str(stats.get("hlo_module", "")), instruction, stats.get("run_id"), scope, graph)


def _placed(events: Iterator[Event], modules: Sequence[tuple[float, float, str]]) -> list[Event]:
    """Events with the program that was running, where they do not name it."""
    starts = np.array([start for start, *_ in modules])
    out = []
    for event in events:
        at = int(np.searchsorted(starts, event.start, side="right")) - 1
        inside = at >= 0 and event.start < modules[at][1]
        out.append(event if event.program or not inside else event._replace(program=modules[at][2], run=at))
    return out


def _complete(events: Sequence[Event]) -> list[Event]:
    """A kernel without a program (a replayed graph's may have none) belongs to the program of the kernel before it."""
    out: list[Event] = []
    for event in events:
        if event.program:
            out.append(event)
        elif out:
            out.append(event._replace(program=out[-1].program, run=out[-1].run))
    return out


def rounds(events: Sequence[Event], programs: Mapping[str, Mapping[str, Label]]) -> list[Round]:
    """The whole rounds among the events: each ends with a run of `decode`.

    Args:
      events: in order of time.
      programs: labels of the instructions of each program; those of programs that are missing here count as "other".
    """
    programs = {program: {plain(name): label for name, label in known.items()} for program, known in programs.items()}
    out: list[Round] = []
    current: list[list[Event]] = []  # runs of programs
    for event in events:
        last = current[-1][-1] if current else None
        another = last is not None and (event.program != last.program or (None not in (event.run, last.run) and event.run != last.run))
        if last is None or another:
            if last is not None and last.program == LAST_PROGRAM:
                out.append(_round(current, programs))
                current = []
            current.append([])
        current[-1].append(event)
    if current and current[-1][-1].program == LAST_PROGRAM:
        out.append(_round(current, programs))
    return out


def _labels_of(run: Sequence[Event], known: Mapping[str, Label] | None, program: str) -> list[Label]:
    """The label of every event of one run of a program; an event without one of its own has that of the event before it."""
    found: list[Label] = []
    own: list[str | None] = []
    label = (OTHER, OTHER)
    for event in run:
        named = None if known is None else known.get(plain(event.instruction))
        if named is None and known is not None and "/" in event.scope:
            named = label_of(event.scope)
        own.append(named[0] if named and named[0] != OTHER else None)
        label = named or label
        found.append(label)
    if program == LAST_PROGRAM:
        return [("decode", part) for _, part in found]
    if any(event.graph for event in run) and any(own):
        stages = _consecutive(own, [event.end - event.start for event in run])
        return [(stage, part) for stage, (_, part) in zip(stages, found, strict=True)]
    return found


def _consecutive(own: Sequence[str | None], durations: Sequence[float]) -> list[str]:
    """The stages of a run's events as three consecutive stretches, in the order that contradicts the least time of named events.

    Equal kernels share a name in a command buffer, so a copy that evicts and one that appends look alike: alone, names are no proof.
    """
    time, count = np.asarray(durations), len(own)
    against = {
        stage: np.concatenate([[0.0], np.cumsum(time * np.array([name not in (None, stage) for name in own]))]) for stage in STAGES[:3]
    }
    best: tuple[float, tuple[str, ...], int, int] | None = None
    for order in itertools.permutations(STAGES[:3]):
        first, second, third = (against[stage] for stage in order)
        opening = np.minimum.accumulate(first - second)  # the best end of the first stretch, for every end of the second
        total = opening + second + third[-1] - third
        end = _last_least(total)
        begin = _last_least((first - second)[: end + 1])
        if best is None or total[end] < best[0]:
            best = (float(total[end]), order, begin, end)
    assert best is not None
    _, order, begin, end = best
    return [order[0]] * begin + [order[1]] * (end - begin) + [order[2]] * (count - end)


def _last_least(values: np.ndarray) -> int:
    """The last place of the least value: an event without a name goes with those before it."""
    return len(values) - 1 - int(np.argmin(values[::-1]))


def _round(runs: Sequence[Sequence[Event]], programs: Mapping[str, Mapping[str, Label]]) -> Round:
    stages: dict[str, float] = {name: 0.0 for name in (*STAGES, OTHER)}
    parts: dict[str, float] = collections.defaultdict(float)
    begin = cursor = runs[0][0].start
    gaps = 0.0
    for run in runs:
        program = run[0].program
        if run[0].start > cursor:  # between two programs
            stages[OTHER] += run[0].start - cursor
            gaps += run[0].start - cursor
            cursor = run[0].start
        found = _labels_of(run, programs.get(program), program)
        if any(event.graph and event.instruction.startswith(GRAPH_LOOP) for event in run):
            end = max(event.end for event in run)
            share = (end - cursor) / sum(event.end - event.start for event in run)
            for event, (stage, part) in zip(run, found, strict=True):
                stages[stage] += share * (event.end - event.start)
                parts[f"{stage}/{part}"] += share * (event.end - event.start)
            cursor = end
            continue
        for event, (stage, part) in zip(run, found, strict=True):
            if event.end > cursor:
                gaps += max(0.0, event.start - cursor)
                stages[stage] += event.end - cursor
                parts[f"{stage}/{part}"] += event.end - cursor
                cursor = event.end
    in_ms = ({name: 1e-6 * value for name, value in times.items()} for times in (stages, parts))
    return Round(*in_ms, total=1e-6 * (cursor - begin), gaps=1e-6 * gaps)
