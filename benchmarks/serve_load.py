"""A server under load, in three phases, each with a server of its own.

    python benchmarks/serve_load.py [live] [visits] [soak] [--json FILE] [--again] [-- flags of serve.py]

live    --streams live streams for --seconds: JPEG frames over WebSockets at the rate that the model looks at, each stream a moment after
        the one before. To hold: no deadline missed, no second skipped.
visits  --visits streams join at random, by either clock, ask, and leave by the end of their video, with a word or without one, in all places
        but two. These belong to streams by the file's clock that are left alone: each is then run again with nobody beside it. To hold: both
        times the same words. In bfloat16 a stream that had to leave its row for a round may choose another word, as sums run in another
        order: `-- --dtype float32` takes that out. Who is refused waits as long as the server says, and gives up after some attempts.
soak    four streams of one video of --rounds seconds, as fast as they go, told over server-sent events and written to caption files. To hold:
        a round takes as long in the last twelfth (half an hour of six) as in the first, within 2%; the caption files are whole.

In every phase: nothing is compiled after the start, and the server's memory in the last tenth is no more than 2% above that of the first
tenth; a decoder's neither, but among visitors, whose decoders live shortly. FILE takes each phase as it ends; one that it has already, asked
for in the same way, is left out, so that a run that was broken off goes on with the next phase. The exit code is 1 where something did not
hold. For a look at whether all works: `--seconds 30 --visits 30 --rounds 300`.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import srt
import webvtt
from PIL import Image
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from svlm_jax.bench.report import surroundings
from svlm_jax.captions import Caption, open_caption_files
from svlm_jax.demo.clip import sample_path
from svlm_jax.demo.make_tiny import tiny_path

ROOT = Path(__file__).parent.parent
FLAT = 0.02  # of memory, and of a round's time
LOOKS = 2.0  # seconds between looks at the server
ATTEMPTS = 15  # to be let in: more than a minute, which is how long a server that was too slow remembers it
SLACK = 5.0  # seconds: a stream begins with its first round, not with its first frame, and its last words come after its last frame
SOAK_STREAMS = 4
UNDISTURBED = 2
AHEAD = 8  # rounds of video that are sent before the first of them is told
Record = dict[str, Any]


# The server, and what it is at


def tree(pid: int) -> list[int]:
    """A process and all below it that are there yet."""
    children: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended
            children += map(int, path.read_text().split())
    return [pid, *(below for child in children for below in tree(child))]


def resident(pid: int) -> int:
    """Bytes; 0 of a process that is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def total(text: str, name: str) -> float:
    """A series of the metrics, over all of its labels."""
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{")))


@dataclasses.dataclass
class Look:
    """The server at one moment."""

    metrics: str
    memory: int  # bytes
    decoders: list[int]  # bytes of each process that decodes
    rounds: list[float]  # seconds of each stream's last round
    lags: list[float]  # seconds from the last frame to the first word, of each live stream


@dataclasses.dataclass
class Server:
    """One that is ready, and the pictures that it is shown."""

    url: str
    pid: int
    places: int
    fps: float
    chunk: float  # seconds
    frames: list[bytes]  # JPEG

    def realtime(self, query: str) -> connect:
        # JPEG does not become smaller: trying costs both sides more than all else
        return connect(f"{self.url.replace('http', 'ws', 1)}/v1/realtime?{query}", max_size=None, compression=None)

    async def look(self, http: httpx.AsyncClient) -> Look:
        metrics, streams = (await http.get("/metrics")).text, (await http.get("/v1/streams")).json()["data"]
        memory, *decoders = map(resident, tree(self.pid))
        rounds = [one["round_seconds"] for one in streams if one["round_seconds"] is not None and one["state"] == "running"]
        lags = [one["lag_seconds"] for one in streams if one["lag_seconds"] is not None and one["state"] == "running"]
        return Look(metrics, memory, decoders, rounds, lags)


@contextlib.contextmanager
def serving(places: int, folder: Path, flags: list[str]) -> Iterator[Server]:
    model = [] if "--model" in flags else ["--model", str(tiny_path()), "--size", "336x252"]
    command = [sys.executable, str(ROOT / "serve.py"), "--port", "0", "--streams", str(places), "--allow-files", str(folder), *model, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = ""
            for line in process.stdout:
                event = json.loads(line)
                url = event.get("url", url).rstrip("/")
                if event["event"] == "server.ready":
                    break
            else:
                raise SystemExit("the server ended before it was ready")
            threading.Thread(target=lambda: list(process.stdout or ()), daemon=True).start()  # its log, which must not block it
            about = httpx.get(f"{url}/v1/models").json()["data"][0]["svlm"]
            frames = [picture(seed, about["height"], about["width"]) for seed in range(16)]
            yield Server(url, process.pid, places, about["fps"], about["chunk_seconds"], frames)
        finally:
            process.terminate()


@contextlib.asynccontextmanager
async def watched(server: Server) -> AsyncIterator[list[Look]]:
    """A look at the beginning, every so often, and at the end."""
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        looks = [await server.look(http)]

        async def watch() -> None:
            while True:
                await asyncio.sleep(LOOKS)
                looks.append(await server.look(http))

        watching = asyncio.create_task(watch())
        try:
            yield looks
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        looks.append(await server.look(http))


def spread(values: list[float]) -> Record:
    """Percentiles of seconds."""
    return {f"p{p}": round(float(np.percentile(values, p)), 4) for p in (50, 95, 99)} if values else {}


def mib(**sizes: float) -> Record:
    return {name: round(size / 2**20, 1) for name, size in sizes.items()}


async def measured(server: Server, phase: Callable[[Server], Coroutine[Any, Any, Record]], *, phase_stays: bool) -> Record:
    """What a phase found, and what the server and this process took for it. `phase_stays`: its streams are there from beginning to end."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    async with watched(server) as looks:
        found = await phase(server)
    after, seconds = resource.getrusage(resource.RUSAGE_SELF), time.monotonic() - began
    first, last, tenth = looks[0], looks[-1], max(1, len(looks) // 10)
    busy = looks[1:-1] or looks

    def grown(name: str) -> float:
        return total(last.metrics, name) - total(first.metrics, name)

    early, late = busy[:tenth], busy[-tenth:]
    memory = [float(np.median([look.memory for look in part])) for part in (early, late)]
    decoders = [float(np.median([size for look in part for size in look.decoders] or [0])) for part in (early, late)]
    holds = {"nothing_is_compiled": grown("svlm_compilations") == 0, "memory_is_flat": memory[1] <= (1 + FLAT) * memory[0]}
    if phase_stays:
        holds["decoders_memory_is_flat"] = decoders[1] <= (1 + FLAT) * decoders[0]
    return found | {
        "took_seconds": round(seconds, 1),
        "round_seconds": spread([value for look in busy for value in look.rounds]),
        "first_word_seconds": spread([value for look in busy for value in look.lags]),
        "deadline_misses": int(grown("svlm_deadline_misses_total")),
        "parked": int(grown("svlm_parked_total")),
        "skipped_seconds": round(grown("svlm_skipped_seconds_total"), 3),
        "refused": {why: int(grown(f'svlm_streams_refused_total{{reason="{why}"}}')) for why in ("places", "deadline")},
        "compilations": int(grown("svlm_compilations")),
        "memory_mib": mib(early=memory[0], late=memory[1], most=max(look.memory for look in looks)),
        "decoder_memory_mib": mib(early=decoders[0], late=decoders[1]),
        "open_files": [int(total(look.metrics, "process_open_fds")) for look in (first, last)],
        "decoders": [len(look.decoders) for look in (first, last)],
        "cpu_seconds": {
            "server": round(grown("process_cpu_seconds_total"), 1),
            "load": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        },
        "holds": found["holds"] | holds,
    }


# Clients


def picture(seed: int, height: int, width: int) -> bytes:
    """Blurred noise, which is as large as a photograph."""
    small = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=85)
    return out.getvalue()


def binary(kind: int, seconds: float = 0.0, data: bytes = b"") -> bytes:
    return bytes([kind]) + round(seconds * 1e6).to_bytes(8, "big") + data


def words(event: Record) -> str:
    """Of a `response.done`."""
    return "".join(part["text"] for item in event["response"]["output"] for part in item["content"])


class NoPlace(Exception):
    """The server let a stream in at another time: the seconds to wait."""

    def __init__(self, seconds: float):
        super().__init__(f"no place for {seconds} s")
        self.seconds = seconds


async def join(socket: ClientConnection) -> None:
    """Waits to be let in. Raises NoPlace."""
    first = json.loads(await socket.recv())
    if first["type"] == "error":
        raise NoPlace(first.get("svlm", {}).get("retry_after", 60.0))


async def let_in(attempt: Callable[[], Coroutine[Any, Any, Any]]) -> bool:
    """Whether one of a few attempts was."""
    for _ in range(ATTEMPTS):
        try:
            await attempt()
        except NoPlace as full:
            await asyncio.sleep(full.seconds)
        else:
            return True
    return False


async def watch_live(server: Server, offset: float, seconds: float, rounds: list[int]) -> None:
    """One live stream, `offset` seconds after the others, until it has told `seconds` of rounds; adds their number."""
    async with server.realtime("clock=live") as socket:
        await join(socket)
        told = 0

        async def send() -> None:
            began = time.monotonic() + offset
            for index in range(round((seconds + SLACK) * server.fps)):
                if told * server.chunk >= seconds:
                    break
                await asyncio.sleep(began + index / server.fps - time.monotonic())
                await socket.send(binary(1, index / server.fps, server.frames[index % len(server.frames)]))
            await socket.send(binary(2))

        sending = asyncio.create_task(send())
        async for text in socket:
            told += json.loads(text)["type"] == "response.done"
        await sending
    rounds.append(told)


async def undisturbed(server: Server, seed: int, more: Callable[[int], bool]) -> list[str]:
    """The words of a stream by the file's clock, which goes on while `more` says so of the rounds that were sent, a few ahead of its words."""
    async with server.realtime(f"clock=file&seed={seed}") as socket:
        await join(socket)
        size, room, said = round(server.fps * server.chunk), asyncio.Semaphore(AHEAD), list[str]()

        async def send() -> None:
            sent = 0
            while more(sent):
                await room.acquire()
                for index in range(sent * size, (sent + 1) * size):
                    await socket.send(binary(1, index / server.fps, server.frames[(index * seed) % len(server.frames)]))
                sent += 1
            await socket.send(binary(2))

        sending = asyncio.create_task(send())
        async for text in socket:
            event = json.loads(text)
            if event["type"] == "response.done":
                said.append(words(event))
                room.release()
        await sending
    return said


async def visit(server: Server, rng: random.Random) -> None:
    """A stream of some frames that asks now and then, and leaves in one of three ways."""
    clock, leave = rng.choice(("live", "live", "file")), rng.choice(("end", "close", "vanish"))
    async with server.realtime(f"clock={clock}&seed={rng.randrange(99)}") as socket:
        await join(socket)
        with contextlib.suppress(ConnectionClosed):  # it may not be told why, but it must not hang
            for index in range(rng.randint(1, 12)):
                await socket.send(binary(1, index / server.fps, rng.choice(server.frames)))
                if rng.random() < 0.2:
                    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Who has the ball?"}]}
                    await socket.send(json.dumps({"type": "conversation.item.create", "item": item}))
                await asyncio.sleep(1 / server.fps)
            if leave == "end":
                await socket.send(binary(2))
                async for _ in socket:
                    pass
            elif leave == "vanish":
                socket.transport.abort()


# The phases


async def live(server: Server, *, seconds: float) -> Record:
    rounds: list[int] = []
    period = 1 / server.fps
    offsets = [period * index / server.places for index in range(server.places)]
    admitted = await asyncio.gather(*(let_in(functools.partial(watch_live, server, offset, seconds, rounds)) for offset in offsets))
    async with httpx.AsyncClient(base_url=server.url) as http:
        look = await server.look(http)
    missed, skipped = total(look.metrics, "svlm_deadline_misses_total"), total(look.metrics, "svlm_skipped_seconds_total")
    expected = int(seconds / server.chunk)
    return {
        "streams": len(rounds),
        "rounds": sorted(rounds),
        "holds": {"all_are_admitted": all(admitted), "no_deadline_is_missed": missed == 0, "no_second_is_skipped": skipped == 0}
        | {"every_round_is_told": all(count >= expected for count in rounds)},
    }


async def visits(server: Server, *, count: int) -> Record:
    left, given_up = count, 0

    async def visitor(seed: int) -> None:
        nonlocal left, given_up
        rng = random.Random(seed)
        while left > 0:
            left -= 1
            given_up += not await let_in(lambda: visit(server, rng))
            await asyncio.sleep(rng.uniform(0.0, 0.5))

    seeds = range(5, 5 + UNDISTURBED)
    visitors = [visitor(seed) for seed in range(server.places - UNDISTURBED)]
    told, _ = await asyncio.gather(
        asyncio.gather(*(undisturbed(server, seed, lambda _: left > 0) for seed in seeds)), asyncio.gather(*visitors)
    )
    alone = [await undisturbed(server, seed, len(one).__gt__) for seed, one in zip(seeds, told, strict=True)]
    unlike = [sum(a != b for a, b in zip(one, other, strict=False)) for one, other in zip(told, alone, strict=True)]
    return {
        "visits": count - given_up,
        "given_up": given_up,
        "undisturbed_rounds": [len(one) for one in told],
        "undisturbed_rounds_with_words": [sum(map(bool, one)) for one in told],
        "undisturbed_rounds_unlike_alone": unlike,
        "holds": {"all_visits_are_made": given_up == 0, "the_undisturbed_say_the_same_alone": told == alone},
    }


async def soak(server: Server, *, rounds: int, folder: Path) -> Record:
    path = folder / "long.mp4"
    lengthen(path, rounds)
    told = await asyncio.gather(*(listen(server, path, rounds, folder / f"soak{index}") for index in range(SOAK_STREAMS)))
    times = np.array([[when for when, _ in one[:rounds]] for one in told])
    spent, twelfth = np.diff(times, axis=1), max(2, rounds // 12)
    early, late = spent[:, : twelfth - 1], spent[:, 1 - twelfth :]
    medians, means = ([float(of(part)) for part in (early, late)] for of in (np.median, np.mean))
    return {
        "streams": SOAK_STREAMS,
        "rounds": [len(one) for one in told],
        "seconds_between_rounds": {"early": medians[0], "late": medians[1], "mean_early": means[0], "mean_late": means[1]},
        "late_over_early": round(medians[1] / medians[0], 4),
        "holds": {
            "all_rounds_are_told": all(len(one) == rounds for one in told),
            "late_rounds_are_as_quick": abs(medians[1] / medians[0] - 1) < FLAT,
            "caption_files_are_whole": all(whole(folder / f"soak{index}", [text for _, text in one]) for index, one in enumerate(told)),
        },
    }


async def listen(server: Server, path: Path, rounds: int, out: Path) -> list[tuple[float, str]]:
    """When each round of the file was told, and its words, which go to caption files."""
    told: list[tuple[float, str]] = []
    async with httpx.AsyncClient(base_url=server.url, timeout=None) as http:
        answer = await http.post("/v1/streams", json={"source": str(path), "duration": rounds})
        answer.raise_for_status()
        with open_caption_files([f"{out}.vtt", f"{out}.srt", f"{out}.jsonl"]) as files:
            files.start()
            async with http.stream("GET", f"/v1/streams/{answer.json()['id']}/captions") as events:
                async for line in events.aiter_lines():
                    data = json.loads(line[6:]) if line.startswith("data: ") else {}
                    if data.get("type") in ("segment", "silence"):
                        told.append((time.monotonic(), data["text"]))
                        files.write(Caption(data["start"], data["end"], data["text"]))
    return told


def lengthen(path: Path, seconds: float) -> None:
    """The sample clip over and over, without encoding it again, for so long at least."""
    with av.open(str(path), "w") as out:
        target, offset, length = None, 0, 0  # the last two in the clip's own ticks
        while target is None or offset < length:
            with av.open(str(sample_path())) as clip:
                source = clip.streams.video[0]
                assert source.duration is not None and source.time_base is not None
                target, length = target or out.add_stream_from_template(source), seconds / source.time_base
                for packet in clip.demux(source):
                    if packet.dts is not None and packet.pts is not None:
                        packet.pts, packet.dts, packet.stream = packet.pts + offset, packet.dts + offset, target
                        out.mux(packet)
                offset += source.duration


def whole(out: Path, words: list[str]) -> bool:
    """Whether other programs' readers find exactly these words in all caption files, at times that grow."""
    lines = [json.loads(line) for line in Path(f"{out}.jsonl").read_text("utf-8").splitlines()]
    starts, spoken = [line["start"] for line in lines], [text for text in words if text]
    cues = [cue.text for cue in webvtt.read(f"{out}.vtt")], [cue.content for cue in srt.parse(Path(f"{out}.srt").read_text("utf-8"))]
    return [line["text"] for line in lines] == words and starts == sorted(set(starts)) and all(texts == spoken for texts in cues)


# The program


def run(name: str, args: argparse.Namespace) -> Record:
    """One phase on a server of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        phases: dict[str, Callable[[Server], Coroutine[Any, Any, Record]]] = {
            "live": functools.partial(live, seconds=args.seconds),
            "visits": functools.partial(visits, count=args.visits),
            "soak": functools.partial(soak, rounds=args.rounds, folder=Path(scratch)),
        }
        places = SOAK_STREAMS if name == "soak" else args.streams
        with serving(places, Path(scratch), args.flags) as server:
            return asyncio.run(measured(server, phases[name], phase_stays=name != "visits")) | {"load_average": os.getloadavg()[0]}


def main() -> int:
    """Runs the phases that are missing, and prints and keeps what came of each."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the server is stopped with it
    names = ("live", "visits", "soak")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("phases", nargs="*", metavar="live|visits|soak", help="those to run; all three, if none is named")
    parser.add_argument("--streams", type=int, default=8, help="places of the server, but for the soak")
    parser.add_argument("--seconds", type=float, default=600.0, help="of the live streams")
    parser.add_argument("--visits", type=int, default=1000, help="of streams that join and leave")
    parser.add_argument("--rounds", type=int, default=21_600, help="of each of the soak's streams")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--again", action="store_true", help="also what FILE has already")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:at], argparse.Namespace(flags=sys.argv[at + 1 :]))
    unknown = set(args.phases) - set(names)
    if unknown or args.streams <= UNDISTURBED:
        parser.error(f"phases are {', '.join(names)}, and --streams more than {UNDISTURBED}")
    kept = json.loads(args.json.read_text("utf-8")) if args.json and args.json.exists() else {}
    asked = {"live": {"seconds": args.seconds}, "visits": {"visits": args.visits}, "soak": {"rounds": args.rounds}}
    for name in args.phases or names:
        how = asked[name] | {"places": SOAK_STREAMS if name == "soak" else args.streams, "flags": args.flags}
        if kept.get(name, {}).get("asked") == how and not args.again:
            continue
        found = run(name, args)
        # Afterwards, so that this process takes no device from the server
        kept[name] = surroundings() | {"cores": len(os.sched_getaffinity(0)), "asked": how} | found
        print(json.dumps({name: kept[name]}, indent=2), flush=True)
        if args.json:
            args.json.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")
    return int(not all(all(kept[name]["holds"].values()) for name in args.phases or names))


if __name__ == "__main__":
    sys.exit(main())
