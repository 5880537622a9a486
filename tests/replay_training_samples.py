"""Produces training samples from their annotations alone, through the product's own code, and then compares them.

    python tests/replay_training_samples.py FILE... [--out DIR]

Of each sample only `annotation`, `fps`, `frame_hw`, `text_sink` and `text_sliding_window` are read before the file has been written
to DIR (under the same name, in the same format), with the real vocabulary; no video is opened. Where the file holds `input_ids`
and `labels`, they are compared then, exactly.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import oracle

from svlm_jax.configs.models import qwen2_5_vl_7b
from svlm_jax.data.annotations import annotation_from
from svlm_jax.data.samples import SampleConfig, lay_out
from svlm_jax.streaming.prompt import PromptLayout

ANSWERS = ("input_ids", "labels")


vocabulary = functools.cache(oracle.tokenizer)


def produce(sample: dict[str, Any]) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one sample, from its other keys."""
    tokenizer = vocabulary()
    config = SampleConfig("published", sample["fps"], sample["text_sink"] or 0, sample["text_sliding_window"] or 0)
    height, width = sample["frame_hw"]
    annotation = annotation_from(sample["annotation"])
    row = lay_out(annotation, config, (height, width), tokenizer, PromptLayout.from_tokenizer(tokenizer), qwen2_5_vl_7b().vision)
    return {"input_ids": row.tokens.tolist(), "labels": row.labels.tolist()}


def compare(ours: dict[str, list[int]], theirs: dict[str, list[int]]) -> None:
    """AssertionError names the first place that differs."""
    for key in ANSWERS:
        a, b = ours[key], theirs[key]
        where = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert a == b, f"{key} differ from {where} on ({len(a)} and {len(b)} tokens): {a[where : where + 8]}, recorded {b[where : where + 8]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="folder that the produced samples are written to")
    arguments = parser.parse_args()
    failed = 0
    for path in arguments.files:
        samples = oracle.read_json(path)
        recorded = [{key: sample.pop(key) for key in ANSWERS if key in sample} for sample in samples]
        produced = [{**sample, **produce(sample)} for sample in samples]
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            oracle.write_json(arguments.out / path.name, produced)
        for sample, answers in zip(produced, recorded, strict=True):
            name = f"{path.name}: {sample.get('name', 'unnamed')}"
            if len(answers) < len(ANSWERS):
                print(f"{name}: {len(sample['input_ids'])} tokens produced, none recorded to compare with", flush=True)
                continue
            try:
                compare(sample, answers)
                print(f"{name}: {len(answers['input_ids'])} tokens and labels exact", flush=True)
            except AssertionError as error:
                failed += 1
                print(f"{name}: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
