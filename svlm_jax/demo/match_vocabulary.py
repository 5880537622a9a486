"""Makes the tokenizer of the model that comments on matches: every word of the grammar is one token.

    python -m svlm_jax.demo.match_vocabulary FOLDER          writes tokenizer.json and tokenizer_config.json
"""

import re
import sys
from pathlib import Path

from svlm_jax.demo.commentary import (
    EVENT_SENTENCES,
    NO_SCORER_SENTENCES,
    NOBODY,
    NUMBERS,
    QUERY,
    QUESTIONS,
    SCORE_SENTENCES,
    SCORER_SENTENCES,
    WHERE,
)
from svlm_jax.demo.make_tokenizer import make, write
from svlm_jax.demo.match import KITS

VOCABULARY = 1_024  # entries at most, special tokens included
STRUCTURE = ("system\n", "user\n", "assistant\n", "previous text\n", "Time=12.0-13.0s", "\n", " ...", "You are a helpful assistant.", QUERY)


def corpus() -> list[str]:
    """Each sentence of the grammar often enough for its words to become tokens, and what prompts say besides."""
    tables = (*EVENT_SENTENCES.values(), SCORE_SENTENCES, SCORER_SENTENCES, NO_SCORER_SENTENCES, *QUESTIONS.values(), tuple(NOBODY.values()))
    sentences = [re.sub(r"\{\w\}", "", sentence) for table in tables for sentence in table]
    words = sorted({word for text in (*sentences, *KITS, *NUMBERS, *WHERE.values()) for word in re.findall(r"[a-z]+", text)})
    # A question begins without the space that words in mid-sentence have
    return [*STRUCTURE * 60, *(f" {word}" for word in words for _ in range(40)), *[text for texts in QUESTIONS.values() for text in texts] * 20]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m svlm_jax.demo.match_vocabulary FOLDER")
    write(make(corpus(), VOCABULARY), Path(sys.argv[1]))
