"""OVO-Bench's three tasks of lmms-eval, unchanged and to their end, on a miniature in the published form.

    python benchmarks/ovo_bench.py [--model DIR] [--way offline streaming] [--openai URL] [--json FILE]

For an environment with lmms-eval 0.7.3 (docs/evaluation.md). With --openai, its model `openai` is asked as well, at a running `serve.py`, about
the two parts that have one round; it is told the videos' paths, so the server needs --allow-files for the folder of temporary files, TMPDIR.
Nothing is downloaded: tasks find data set and videos where they look first, in
`kcz358/OVOBench` under the working directory and in `$HF_HOME/ovobench/chunked_videos`. The videos are beginnings of the sample clip, the right
answers are arbitrary, and the tiny model has learnt nothing: what is shown is that every round is asked and scored.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import av

from svlm_jax.bench.report import commit, write_json
from svlm_jax.demo.clip import sample_path
from svlm_jax.demo.make_tiny import tiny_path

TASKS = ("ovo_backward", "ovo_realtime", "ovo_forward")
CHOICES = ["the red team", "the blue team", "nobody", "the goalkeeper"]


def asked(number: int, task: str, gt: int) -> dict[str, Any]:
    """A row of the backward or realtime part."""
    question = {"EPM": "Who had the ball at first?", "ASI": "What came before the shot?", "HLD": "Who was sent off?"}.get(
        task, "Who has the ball now?"
    )
    return {
        "id": number,
        "task": task,
        "video": f"games/{number}.mp4",
        "realtime": 8.0,
        "question": question,
        "options": CHOICES,
        "gt": gt,
        "answer": CHOICES[gt],
    }


def round_by_round(number: int, task: str, rounds: list[dict[str, Any]], **about: str) -> dict[str, Any]:
    """A row of the forward part, asked anew after so many seconds."""
    return {"id": number, "task": task, "activity": None, "question": None, "answer": "", **about, "test_info": rounds}


COUNTS = [{"realtime": 4.0, "count": 1}, {"realtime": 8.0, "count": 2}]
GOALS = [{"realtime": 4.0, "type": 0}, {"realtime": 8.0, "type": 0}, {"realtime": 12.0, "type": 1}]
ROWS = {
    "backward": [asked(0, "EPM", 0), asked(1, "ASI", 2), asked(2, "HLD", 3)],
    "realtime": [asked(3 + i, task, i % 4) for i, task in enumerate(("OCR", "ACR", "ATR", "STU", "FPD", "OJR"))],
    "forward": [
        round_by_round(9, "REC", COUNTS, activity="pass the ball"),
        round_by_round(10, "SSR", [{"realtime": 4.0, "step": "kick off", "type": 1}]),
        round_by_round(11, "CRR", GOALS, question="Who scored the last goal?"),
    ],
}
INFO = ("realtime", "count", "step", "type")  # columns of test_info, which all rows have in a table


def beginning(target: Path, seconds: float) -> None:
    """The first seconds of the sample clip, packets copied."""
    with av.open(str(sample_path())) as source, av.open(str(target), "w") as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None and packet.pts * packet.time_base < seconds:
                packet.stream = copy
                out.mux(packet)


def write_miniature(root: Path) -> None:
    """The data set and the videos, below `root`."""
    data, videos = root / "kcz358" / "OVOBench", root / "hf" / "ovobench" / "chunked_videos"
    data.mkdir(parents=True)
    videos.mkdir(parents=True)
    names = "".join(f"- config_name: {part}\n  data_files:\n  - split: test\n    path: {part}.json\n" for part in ROWS)
    (data / "README.md").write_text(f"---\nconfigs:\n{names}---\n")
    for part, rows in ROWS.items():
        lines = []
        for row in rows:
            if part == "forward":
                row = {**row, "test_info": [{key: info.get(key) for key in INFO} for info in row["test_info"]]}
                for number, info in enumerate(row["test_info"]):
                    beginning(videos / f"{row['id']}_{number}.mp4", info["realtime"])
            else:
                beginning(videos / f"{row['id']}.mp4", row["realtime"])
            lines.append(json.dumps(row) + "\n")
        (data / f"{part}.json").write_text("".join(lines))


def evaluate(root: Path, way: str, model: str, settings: str, tasks: Sequence[str] = TASKS) -> dict[str, Any]:
    """What lmms-eval reports of one of its models, asked in one way."""
    out = root / way
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--model",
        model,
        "--model_args",
        settings,
        "--tasks",
        ",".join(tasks),
        "--batch_size",
        "1",
    ]
    home = {"OPENAI_API_KEY": os.environ.get("OPENAI_API_KEY", "none"), "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    subprocess.run([*command, "--output_path", str(out), "--log_samples"], cwd=root, env={**os.environ, **home}, check=True)
    results = json.loads(next(out.rglob("*_results.json")).read_text())["results"]
    answers: dict[str, list[Any]] = {}
    for task in tasks:
        samples = next(out.rglob(f"*samples_{task}.jsonl"))
        answers[task] = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    metrics = {task: {name: value for name, value in results[task].items() if isinstance(value, float | int)} for task in tasks}
    counts = {task: len(found) for task, found in answers.items()}
    found: dict[str, Any] = {"scores": metrics, "answers": counts}
    rounds = [len(row["test_info"]) for row in ROWS["forward"]]
    if "ovo_forward" in answers:
        found["rounds_of_forward"] = [len(replies) for replies in answers["ovo_forward"]]
    if found.get("rounds_of_forward", rounds) != rounds or counts != {task: len(ROWS[task.removeprefix("ovo_")]) for task in tasks}:
        raise SystemExit(f"not every round was answered: {answers}")
    return found


def served(url: str) -> str:
    """The name of the model that a server has."""
    with urllib.request.urlopen(f"{url}/models") as answer:
        return json.load(answer)["data"][0]["id"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(tiny_path()), help="a checkpoint (default: the tiny one)")
    parser.add_argument("--way", nargs="*", choices=("offline", "streaming"), default=["offline", "streaming"])
    parser.add_argument("--openai", metavar="URL", help="ask a server too, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--json", help="where the record goes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        write_miniature(Path(scratch))
        ways = {way: ("svlm", f"way={way},max_frames=8,max_pixels=9408,path={args.model}", TASKS) for way in args.way}
        if args.openai:
            settings = f"model={served(args.openai)},base_url={args.openai},num_concurrent=1,max_frames_num=8,pass_video_url=True"
            ways["openai"] = ("openai", settings, TASKS[:2])
        found = {way: evaluate(Path(scratch), way, *how) for way, how in ways.items()}
    versions = {name: metadata.version(name) for name in ("lmms-eval", "av", "jax", "datasets", "transformers")}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    told = {
        "date": date,
        "commit": commit(),
        "command": " ".join(["python benchmarks/ovo_bench.py", *(["--openai URL"] if args.openai else [])]),
        "model": Path(args.model).name,
        "versions": versions,
        **found,
    }
    print(json.dumps(told, indent=2))
    if args.json:
        write_json(Path(args.json), [told])


if __name__ == "__main__":
    main()
