"""A server under load: live streams on its own machine, and others that come and go beside them.

    python benchmarks/serve_load.py [--streams 8] [--seconds 60] [--json FILE] [-- flags of serve.py]

Some places are taken by live streams for the whole time: JPEG frames over WebSockets at the rate that the model looks at. One is taken by
a stream by the file's clock whose words are known from a run alone, and one by streams that join, ask and leave at random. Reported: rounds,
deadline misses, skipped seconds, time from a frame to the first word, and whether the known stream said the same words as alone.
"""

import argparse
import asyncio
import dataclasses
import io
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from websockets.asyncio.client import connect

ROOT = Path(__file__).parent.parent
FILE_ROUNDS = 12


@dataclasses.dataclass
class Heard:
    """What one live stream was told."""

    rounds: int = 0
    skipped: float = 0.0  # seconds
    refused: str = ""  # why it was not admitted
    first_words: list[float] = dataclasses.field(default_factory=list)  # seconds from the frame before


def picture(seed: int, height: int, width: int) -> bytes:
    """Blurred noise, which is as large as a photograph."""
    small = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=85)
    return out.getvalue()


def binary(kind: int, seconds: float, data: bytes = b"") -> bytes:
    return bytes([kind]) + round(seconds * 1e6).to_bytes(8, "big") + data


async def live(url: str, frames: list[bytes], fps: float, seconds: float) -> Heard:
    """One live stream, from its first frame to its last."""
    heard, sent = Heard(), [0.0]
    async with connect(f"{url.replace('http', 'ws', 1)}/v1/realtime?clock=live", max_size=None) as socket:

        async def send() -> None:
            began, count = time.monotonic(), 0
            while time.monotonic() - began < seconds:
                await asyncio.sleep(max(0.0, began + count / fps - time.monotonic()))
                sent[0] = time.monotonic()
                await socket.send(binary(1, count / fps, frames[count % len(frames)]))
                count += 1
            await socket.send(binary(2, 0))

        first = json.loads(await socket.recv())
        if first["type"] == "error":
            heard.refused = first["error"]["message"]
            return heard
        sending = asyncio.create_task(send())
        async for text in socket:
            event = json.loads(text)
            if event["type"] == "response.created":
                heard.first_words.append(time.monotonic() - sent[0])
            elif event["type"] == "response.done":
                heard.rounds += 1
            elif event["type"] == "svlm" and event["svlm"]["type"] == "gap":
                heard.skipped += event["svlm"]["end"] - event["svlm"]["start"]
        await sending
    return heard


async def known(url: str, frames: list[bytes], fps: float) -> list[str]:
    """The words of a stream by the file's clock."""
    words = []
    async with connect(f"{url.replace('http', 'ws', 1)}/v1/realtime?clock=file&seed=5", max_size=None) as socket:
        for index in range(round(FILE_ROUNDS * fps)):
            await socket.send(binary(1, index / fps, frames[index % len(frames)]))
        await socket.send(binary(2, 0))
        async for text in socket:
            event = json.loads(text)
            if event["type"] == "response.done":
                words.append("".join(part["text"] for item in event["response"]["output"] for part in item["content"]))
    return words


async def come_and_go(url: str, frames: list[bytes], fps: float, seconds: float, seed: int) -> int:
    """Streams that stay for some seconds, ask, and leave without a word; gives how many they were."""
    rng, began, count = random.Random(seed), time.monotonic(), 0
    while time.monotonic() - began < seconds:
        async with connect(f"{url.replace('http', 'ws', 1)}/v1/realtime?clock=live", max_size=None) as socket:
            if json.loads(await socket.recv())["type"] == "error":
                await asyncio.sleep(1.0)
                continue
            count += 1
            for index in range(rng.randint(1, 12)):
                await socket.send(binary(1, index / fps, frames[index % len(frames)]))
                if rng.random() < 0.2:
                    part = {"type": "input_text", "text": "Who has the ball?"}
                    item = {"type": "message", "role": "user", "content": [part]}
                    await socket.send(json.dumps({"type": "conversation.item.create", "item": item}))
                await asyncio.sleep(1 / fps)
        await asyncio.sleep(0.2)
    return count


async def load(url: str, streams: int, seconds: float) -> dict[str, Any]:
    """Runs it all and sums it up. Two of the places are for the known stream and the ones that come and go."""
    about = httpx.get(f"{url}/v1/models").json()["data"][0]["svlm"]
    fps, frames = about["fps"], [picture(seed, about["height"], about["width"]) for seed in range(16)]
    alone = await known(url, frames, fps)
    before = httpx.get(f"{url}/metrics").text
    lives = [live(url, frames, fps, seconds) for _ in range(max(1, streams - 2))]

    async def again() -> list[list[str]]:
        began, said = time.monotonic(), []
        while time.monotonic() - began < seconds - FILE_ROUNDS * about["chunk_seconds"]:
            said.append(await known(url, frames, fps))
        return said

    *heard, said, visitors = await asyncio.gather(*lives, again(), come_and_go(url, frames, fps, seconds, 1))
    after = httpx.get(f"{url}/metrics").text
    waits = np.array(sorted(wait for one in heard for wait in one.first_words) or [0.0])
    return {
        "streams": streams,
        "seconds": seconds,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "live_streams": len(heard),
        "refused": sorted({one.refused for one in heard if one.refused}),
        "live_rounds": sum(one.rounds for one in heard),
        "live_skipped_seconds": round(sum(one.skipped for one in heard), 3),
        "deadline_misses": total(after, "svlm_deadline_misses_total") - total(before, "svlm_deadline_misses_total"),
        "round_seconds_mean": round(mean(before, after, 'svlm_stage_seconds_%s{stage="round"}'), 4),
        "first_word_seconds": {f"p{p}": round(float(np.percentile(waits, p)), 4) for p in (50, 95, 99)},
        "visitors": visitors,
        "known_runs": len(said),
        "known_runs_unlike_alone": sum(words != alone for words in said),
    }


def total(text: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"{name} "))


def mean(before: str, after: str, series: str) -> float:
    sums, counts = (total(after, series % kind) - total(before, series % kind) for kind in ("sum", "count"))
    return sums / max(1.0, counts)


def main() -> None:
    """Starts the server, runs the load, prints what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("flags", nargs="*", help="of serve.py")
    args = parser.parse_args()
    command = [sys.executable, str(ROOT / "serve.py"), "--port", "0", "--streams", str(args.streams), *args.flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            url = ""
            for line in server.stdout:
                event = json.loads(line)
                url = event.get("url", url).rstrip("/")
                if event["event"] == "server.ready":
                    break
            threading.Thread(target=lambda: list(server.stdout or ()), daemon=True).start()  # its log, which must not block it
            result = asyncio.run(load(url, args.streams, args.seconds))
        finally:
            server.terminate()
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
