"""Makes the tiny model: every mechanism of Qwen2.5-VL at a twenty-thousandth of the size, with random weights.

    python -m svlm_jax.demo.make_tiny              writes svlm_jax/demo/tiny beside its tokenizer, in seconds

It has learnt nothing: it says words at random, so that streams, captions and pages can be tried without any download. Two
features are set aside, which no layer writes to. The first is one constant for every token, so the head's first row is a
bias: it makes whole words likely, pieces of words unlikely, and special tokens nearly impossible but for the end of a turn.
The second marks the pause " ...", after which a turn ends, and the newline before a turn, after which it does not.
"""

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

from svlm_jax.checkpoints.hub_config import TokenIds
from svlm_jax.checkpoints.plan import leaves
from svlm_jax.checkpoints.save import save_params
from svlm_jax.config import ModelConfig
from svlm_jax.configs.models import tiny
from svlm_jax.demo.make_tokenizer import OTHER_WORDS, sentences
from svlm_jax.model.qwen_vl import abstract_params
from svlm_jax.tokenizer import Tokenizer
from svlm_jax.types import Params

SEED = 0
CONSTANT = 2.0  # first feature of every token's embedding; the others are normal, of variance 1
SPREAD = 2.2  # standard deviation of a word's logit over contexts
# What a token's logit is on average, by kind, before the final norm scales it
WORD, PUNCTUATION, PIECE, SPECIAL, PAUSE, TURN_END = 0.0, 1.5, -18.0, -25.0, 7.0, 3.0
# What the token before adds to it, at most
SAME_AGAIN, TURN_END_AFTER_PAUSE = -8.0, 30.0
BATCH_OF_ROWS = 64  # the embedding's rows are a multiple of it, as in the large models

CARD = """---
license: apache-2.0
library_name: svlm-jax
---
# tiny

**The weights are random: this model has learnt nothing, and what it says means nothing.** It has the architecture of
Qwen2.5-VL ({parameters:,} parameters, bfloat16) and a vocabulary of {vocabulary:,} tokens for ball games. It is here to try
the software and to test it: captions, caches, servers, conversions. Do not judge quality or speed by it.

Written by `python -m svlm_jax.demo.make_tiny` from seed {seed}; the tokenizer by `python -m svlm_jax.demo.make_tokenizer`.
"""


def tiny_path() -> Path:
    """The tiny model's directory."""
    return Path(__file__).with_name("tiny")


def config_for(tokenizer: Tokenizer) -> ModelConfig:
    return tiny(-(-tokenizer.vocab_size // BATCH_OF_ROWS) * BATCH_OF_ROWS)


def make(tokenizer: Tokenizer) -> Params:
    """The parameters, as bfloat16 NumPy arrays."""
    config = config_for(tokenizer)
    rng = np.random.Generator(np.random.PCG64(SEED))
    params: dict = {}
    for path, leaf in leaves(abstract_params(config)):
        at = params
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = _draw(rng, str(path[-1]), leaf.shape)
    text = params["text"]
    for layer in text["layers"].values():
        layer["out"][..., :2] = 0
        layer["down"][..., :2] = 0
    text["embedding"][:, :2] = CONSTANT, 0
    text["head"] *= SPREAD
    _bias(tokenizer, text["embedding"], text["head"])
    return _rounded(params)


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers that keep the variance of what they multiply; norms of 1; small biases."""
    if name.endswith("norm"):
        return np.ones(shape, np.float32)
    numbers = rng.standard_normal(shape, np.float32)
    if name.endswith("bias"):
        return numbers * np.float32(0.02)
    inputs = {"embedding": 1, "out": int(np.prod(shape[:-1]))}.get(name, shape[0])
    return numbers * np.float32(inputs**-0.5)


def _bias(tokenizer: Tokenizer, embedding: np.ndarray, head: np.ndarray) -> None:
    """Sets the head's first two rows, and makes the same word again less likely."""
    words = set(re.findall(r"[A-Za-z-]+", " ".join((*sentences(), *OTHER_WORDS))))
    levels = np.full(head.shape[1], SPECIAL)
    levels[: tokenizer.vocab_size] = [_level(tokenizer.decode([id], skip_special=False), words) for id in range(tokenizer.vocab_size)]
    pause, newline, turn_end = tokenizer.encode(" ...")[0], tokenizer.encode("\n")[0], tokenizer.special("<|im_end|>")
    levels[pause], levels[turn_end] = PAUSE, TURN_END
    head[:, [pause, turn_end]] *= 0.3  # said at a steady rate, whatever the context
    head[2:] += SAME_AGAIN * embedding[:, 2:].T / (head.shape[0] - 2)
    head[0] = levels / CONSTANT
    head[1] = 0
    head[1, turn_end] = TURN_END_AFTER_PAUSE / CONSTANT
    embedding[pause, 1], embedding[newline, 1] = CONSTANT, -CONSTANT


def _level(text: str, words: set[str]) -> float:
    if re.fullmatch(r"<\|.*\|>", text):
        return SPECIAL
    if text.startswith(" ") and text[1:] in words:
        return WORD
    return PUNCTUATION if text in {",", ".", "!"} else PIECE


def _rounded(tree: dict) -> dict:
    return {key: _rounded(value) if isinstance(value, dict) else value.astype(ml_dtypes.bfloat16) for key, value in tree.items()}


def write(folder: Path) -> Path:
    """Writes the model into `folder`, over what is there; its tokenizer files must be there already."""
    tokenizer = Tokenizer.load(folder)
    ids, params = TokenIds.of(tokenizer), make(tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        saved = save_params(params, config_for(tokenizer), Path(scratch) / "model", tokenizer_files_from=folder)
        for name in ("model.safetensors", "config.json"):
            shutil.copyfile(saved / name, folder / name)
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": ids.end_of_text,
            "do_sample": True,
            "eos_token_id": [ids.turn_end, ids.end_of_text],
            "pad_token_id": ids.end_of_text,
            "repetition_penalty": 1.05,
            "temperature": 0.9,
        },
    )
    count = sum(leaf.size for _, leaf in leaves(params))
    card = CARD.format(parameters=count, vocabulary=tokenizer.vocab_size, seed=SEED)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print(write(tiny_path()), file=sys.stderr)
