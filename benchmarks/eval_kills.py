"""`svlm eval` killed (-9) at random points until it comes to its end, against the same run left alone: is one byte of its report another?

    python benchmarks/eval_kills.py [--kills 8] [--seed 0] [--json FILE]

Inf-Streams-Eval and LiveSports-3K-CC in miniature (tests/data/evaluation) over films of simulated matches: the tiny model against a
server that takes pictures, judged over HTTP, all on this machine. While runs are killed, the server also answers every fourth request with
500, 429, half a JSON object or prose. Fails unless reports and results are the same bytes, and no question has two verdicts.
"""

import argparse
import hashlib
import itertools
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from svlm_jax.bench.report import surroundings, write_json
from svlm_jax.demo.film import FilmConfig, write_video
from svlm_jax.demo.match import simulate
from svlm_jax.evaluation.inf_streams import read_games
from svlm_jax.evaluation.journal import read_journal
from svlm_jax.evaluation.livesports import read_events

DATA = Path(__file__).parents[1] / "tests" / "data" / "evaluation"
GAMES, EVENTS = DATA / "inf_streams.jsonl", DATA / "livesports.json"
STREAM = ("--max-pixels", "9408", "--streams", "2", "--save-every", "5", "--wait", "0.01", "--workers", "2")
SUBJECTS = {
    "inf-streams": (str(GAMES), "--start", "4", "--segment", "10", "--min-words", "15", *STREAM),
    "livesports": (str(EVENTS), *STREAM),
}
RESULTS = [f"{side}/{name}" for side in "ab" for name in ("merged_result.jsonl", "predictions.jsonl")]
COMPARED = ("report.json", "report.md", "score_segments.jsonl", *RESULTS)


class Handler(BaseHTTPRequestHandler):
    """A judge and a commentator, whose answers follow from what they are shown."""

    protocol_version = "HTTP/1.1"
    failing = False
    count: Iterator[int] = itertools.count()

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        digest = hashlib.sha256(json.dumps(body["messages"]).encode()).digest()[0]
        text = f"Okafor has it, and the score is {digest}." if body["model"] == "commentator" else "AB"[digest % 2]
        number, status = next(Handler.count), 200
        answer = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})
        if self.failing and number % 4 == 0:
            kind = number // 4 % 4
            status = (500, 429, 200, 200)[kind]
            if kind == 2:
                answer = answer[: len(answer) // 2]
            elif kind == 3 and body["model"] == "judge":
                answer = answer.replace(json.dumps(text), json.dumps("Both have their merits."))
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())


def write_videos(folder: Path) -> None:
    """A film of a simulated match for each video that the miniatures name."""
    length = {game.video: float(game.end) for game in read_games(GAMES)}
    for event in read_events(EVENTS):
        length[event.video] = max(event.end, length.get(event.video, 0.0))
    for seed, (name, seconds) in enumerate(sorted(length.items())):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(simulate(seed, seconds + 1), path, FilmConfig(fps=4, height=112, width=112))


def start(subject: str, videos: Path, out: Path, url: str) -> subprocess.Popen:
    sides = ("--a", "demo", "--b", f"them={url}#commentator", "--judge", f"{url}#judge")
    command = [sys.executable, "-m", "svlm_jax.cli", "eval", subject, *SUBJECTS[subject]]
    return subprocess.Popen(
        [*command, "--videos", str(videos), "--out", str(out), *sides], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finished(run: subprocess.Popen) -> None:
    error = run.communicate()[1]
    if run.returncode:
        raise SystemExit(error)


def outcome(out: Path) -> dict[str, bytes]:
    """What must not differ."""
    return {name: (out / name).read_bytes() for name in COMPARED if (out / name).exists()}


def rows(out: Path) -> dict[str, int]:
    """How far a run has come."""
    return {name: len(read_journal(out / name)) for name in ("a/results.jsonl", "b/results.jsonl", "verdicts.jsonl")}


def kill(subject: str, videos: Path, whole: Path, out: Path, url: str, kills: int, rng: random.Random) -> dict[str, Any]:
    """Runs, kills, runs again; SystemExit where anything comes out otherwise than undisturbed."""
    Handler.failing = False
    began = time.monotonic()
    finished(start(subject, videos, whole, url))
    seconds = time.monotonic() - began
    Handler.failing, points = True, []
    while len(points) < kills:
        run = start(subject, videos, out, url)
        last = sum(rows(out).values()) + rng.randint(1, 5)
        while run.poll() is None and sum(rows(out).values()) < last:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.1))
        if run.poll() is not None:
            break
        run.kill()
        run.communicate()
        points.append(rows(out))
    finished(start(subject, videos, out, url))
    verdicts = [row["key"] for row in map(json.loads, (out / "verdicts.jsonl").read_text().splitlines()) if row["outcome"] in ("A", "B")]
    if outcome(out) != outcome(whole) or len(verdicts) != len(set(verdicts)):
        raise SystemExit(f"{subject}: the killed run differs: compare {whole} and {out}")
    requests = json.loads((out / "requests.json").read_text())
    return {"seconds_undisturbed": round(seconds, 1), "rows_at_each_kill": points, "requests": requests, "identical": sorted(outcome(out))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=8, help="of each benchmark, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the points")
    parser.add_argument("--json", help="where the record goes")
    args = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, rng, found = f"http://127.0.0.1:{server.server_address[1]}/v1", random.Random(args.seed), {}
    with tempfile.TemporaryDirectory() as scratch:
        videos = Path(scratch) / "videos"
        write_videos(videos)
        for subject in SUBJECTS:
            folders = [Path(scratch) / f"{subject}-{how}" for how in ("whole", "killed")]
            found[subject] = kill(subject, videos, *folders, url, args.kills, rng)
    told = surroundings() | {"command": f"python benchmarks/eval_kills.py --kills {args.kills} --seed {args.seed}", "model": "demo", **found}
    print(json.dumps(told, indent=1))
    if args.json:
        write_json(Path(args.json), [told])


if __name__ == "__main__":
    main()
