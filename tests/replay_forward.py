"""Produces plain forward passes from their prompts alone, through the product's own code, and then compares them.

    python tests/replay_forward.py FILE... [--out DIR]

Of every case only `config`, `parts` and `fps`, and `name`, `family` and `candidate_token_ids` where they are given, are read
before the file has been written to DIR. Then what was recorded is compared: ids exactly, positions within a float32's rounding,
vision features within 1e-4, logits within 1e-3; and greedy `generate` is compared with the argmax of the plain forward, token
by token.
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
from svlm_jax.errors import UserError
from svlm_jax.generate import answer
from svlm_jax.model.qwen_vl import forward, vision_features
from svlm_jax.streaming.prompt import PromptLayout
from svlm_jax.types import Params

GIVEN = ("name", "config", "family", "parts", "fps", "candidate_token_ids")
FEATURE_TOLERANCE, LOGIT_TOLERANCE = 1e-4, 1e-3
POSITION_TOLERANCE = 1e-3  # positions are whole multiples of 1/q, which a recording holds as float32: thirds at 3 frames a second
GREEDY_TOKENS = 8
CANDIDATES = [  # of all recordings; for a prompt that names none
    *(151645, 2503, 198, 279, 264, 374, 304, 323, 311, 315, 389, 448, 369, 566, 433, 1431, 2219, 4227, 1414, 1279, 5000, 7777, 12345, 23456)
]


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
    prompt, _ = prompt_of(case, config)
    features: dict[str, list[np.ndarray]] = {"image": [], "video": []}
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    for part, frames in zip((p for p in case["parts"] if not isinstance(p, str)), prompt.visuals, strict=True):
        features[part[0]].append(np.asarray(vision_features(params, config, jnp.asarray(frames)[None]).embedded)[0])
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
    for key in ("input_ids", "image_grid_thw", "video_grid_thw"):
        assert ours[key] == theirs[key], f"{key} differs"
    ours_at, theirs_at = np.array(ours["position_ids"]), np.array(theirs["position_ids"])
    assert ours_at.shape == theirs_at.shape and np.abs(ours_at - theirs_at).max() < POSITION_TOLERANCE, "position_ids differs"
    worst = {"features": 0.0, "logits_cand": 0.0}
    for key in ("image_features", "video_features", "logits_cand"):
        if key in theirs:
            assert key in ours and np.shape(ours[key]) == np.shape(theirs[key]), f"{key} differs in shape"
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


def replay(path: Path, out: Path | None) -> int:
    """Produces one file, writes it, and prints how each case compares; gives the number of those that differ. UserError for a bad file."""
    recorded = oracle.read_json(path)
    if not isinstance(recorded, list):
        raise UserError(f"{path} holds no list of prompts: give a recording as in tests/data")
    for index, case in enumerate(recorded):
        oracle.need(case, f"prompt {index}", "config", "parts")
        oracle.need(case, f"prompt {index}", *["fps"] * any(part[:1] == ["video"] for part in case["parts"]))
    given = [{key: case[key] for key in GIVEN if key in case} for case in recorded]
    for case in given:
        case.setdefault("candidate_token_ids", CANDIDATES)
    produced = [{**case, **produce(case)} for case in given]
    oracle.write_beside(path, out, produced)
    failed = 0
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
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="folder that the produced files are written to")
    arguments = parser.parse_args()
    failed = 0
    for path in arguments.files:
        try:
            failed += replay(path, arguments.out)
        except UserError as error:
            failed += 1
            print(f"{path.name}: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
