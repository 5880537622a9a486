"""Produces plain forward passes from their prompts alone, through the product's own code, and then compares them.

    python tests/replay_forward.py FILE... [--out DIR]

Of every case only `name`, `config`, `parts`, `fps` and `candidate_token_ids` are read before the file has been written to
DIR. Then what was recorded is compared: ids and positions exactly, vision features within 1e-4, logits within 1e-3; and
greedy `generate` is compared with the argmax of the plain forward, token by token.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import recipe

from svlm_jax.config import ModelConfig
from svlm_jax.data.chat import ChatPrompt, Clip, Image, Part, lay_out
from svlm_jax.generate import answer
from svlm_jax.model.qwen_vl import forward, vision_features
from svlm_jax.streaming.prompt import PromptLayout
from svlm_jax.types import Params

GIVEN = ("name", "config", "family", "parts", "fps", "candidate_token_ids")
FEATURE_TOLERANCE, LOGIT_TOLERANCE = 1e-4, 1e-3
GREEDY_TOKENS = 8


def read_parts(case: dict[str, Any]) -> list[Part]:
    parts: list[Part] = []
    for part in case["parts"]:
        if isinstance(part, str):
            parts.append(part)
        elif part[0] == "image":
            parts.append(Image(recipe.frames(part[1], 0, 1, *part[2:])[0]))
        else:
            parts.append(Clip(recipe.frames(part[1], 0, *part[2:]), case["fps"]))
    return parts


def logits(params: Params, config: ModelConfig, prompt: ChatPrompt) -> np.ndarray:
    """[T, V] of one prompt."""

    @jax.jit
    def run(params, tokens, positions, visuals, places):
        return forward(params, config, tokens, positions, visuals=visuals, places=places, denominator=prompt.unit)

    visuals = tuple(frames[None] for frames in prompt.visuals)
    return np.asarray(run(params, prompt.tokens[None], prompt.positions[None], visuals, prompt.places[None]))[0]


def prompt_of(case: dict[str, Any], config: ModelConfig) -> tuple[ChatPrompt, PromptLayout]:
    tokenizer = oracle.tokenizer()
    layout = PromptLayout.from_tokenizer(tokenizer)
    return lay_out(read_parts(case), tokenizer, layout, config.vision), layout


def produce(case: dict[str, Any]) -> dict[str, Any]:
    """The recorded keys of a case, from what is given."""
    config, params = oracle.make_model(case, stacked=True)
    prompt, _layout = prompt_of(case, config)
    features: dict[str, list[np.ndarray]] = {"image": [], "video": []}
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    for part, frames in zip((p for p in case["parts"] if not isinstance(p, str)), prompt.visuals, strict=True):
        features[part[0]].append(np.asarray(vision_features(params, config, jnp.asarray(frames)[None]))[0])
        patch = config.vision.patch_size
        grids[part[0]].append([-(-len(frames) // 2), frames.shape[2] // patch, frames.shape[3] // patch])
    record = {
        "input_ids": prompt.tokens.tolist(),
        "position_ids": (prompt.positions.T / prompt.unit).tolist(),
        "logits_cand": logits(params, config, prompt)[:, case["candidate_token_ids"]].tolist(),
        "image_grid_thw": grids["image"],
        "video_grid_thw": grids["video"],
    }
    return record | {f"{kind}_features": np.concatenate(found).tolist() for kind, found in features.items() if found}


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float]:
    """The largest differences of a feature and of a logit."""
    for key in ("input_ids", "position_ids", "image_grid_thw", "video_grid_thw"):
        assert np.array_equal(ours[key], theirs[key]), f"{key} differs"
    worst = {"features": 0.0, "logits_cand": 0.0}
    for key in ("image_features", "video_features", "logits_cand"):
        if key in theirs:
            difference = float(np.abs(np.array(ours[key]) - np.array(theirs[key])).max())
            kind, tolerance = ("logits_cand", LOGIT_TOLERANCE) if key == "logits_cand" else ("features", FEATURE_TOLERANCE)
            worst[kind] = max(worst[kind], difference)
            assert difference <= tolerance, f"{key} differs by {difference:.1e}"
    return worst["features"], worst["logits_cand"]


def check_greedy(case: dict[str, Any]) -> int:
    """`generate` greedily, and the plain forward over prompt and answer: every token is the argmax of the row before it."""
    config, params = oracle.make_model(case)
    prompt, layout = prompt_of(case, config)
    tokens, _ = answer(params, config, layout, prompt, max_new_tokens=GREEDY_TOKENS)
    grown = np.concatenate([prompt.tokens, np.asarray(tokens[:-1], np.int32)])
    more = prompt.end + np.repeat(np.arange(len(tokens) - 1)[:, None] * prompt.unit, 3, axis=1)
    whole = ChatPrompt(grown, np.concatenate([prompt.positions, more.astype(np.int32)]), prompt.unit, prompt.visuals, prompt.places, prompt.end)
    best = logits(params, config, whole)[len(prompt.tokens) - 1 :].argmax(-1).tolist()
    assert best == tokens, f"generate says {tokens}, the plain forward {best}"
    return len(tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="folder that the produced files are written to")
    arguments = parser.parse_args()
    failed = 0
    for path in arguments.files:
        recorded = oracle.read_json(path)
        given = [{key: case[key] for key in GIVEN if key in case} for case in recorded]
        produced = [{**case, **produce(case)} for case in given]
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            oracle.write_json(arguments.out / path.name, produced)
        for case, ours, theirs in zip(given, produced, recorded, strict=True):
            name = case.get("name", path.name)
            try:
                count = check_greedy(case)
                if "input_ids" not in theirs:
                    print(f"{name}: produced, nothing recorded; generate equals the forward for {count} tokens", flush=True)
                    continue
                features, logit = compare(ours, theirs)
                print(
                    f"{name}: exact; largest difference of a feature {features:.1e}, of a logit {logit:.1e}; "
                    f"generate equals the forward for {count} tokens",
                    flush=True,
                )
            except AssertionError as error:
                failed += 1
                print(f"{name}: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
