"""Writes the untrained model that commentary of matches is learnt by: sizes, tokenizer, random weights.

    python -m svlm_jax.demo.make_match_model FOLDER
"""

import sys
import tempfile
from pathlib import Path

import jax

from svlm_jax.checkpoints.save import save_params
from svlm_jax.checkpoints.stream_settings import write_stream_settings
from svlm_jax.configs.models import match
from svlm_jax.demo.commentary import QUERY
from svlm_jax.demo.make_tokenizer import make
from svlm_jax.demo.make_tokenizer import write as write_tokenizer
from svlm_jax.demo.match_vocabulary import VOCABULARY, corpus
from svlm_jax.demo.picture import HEIGHT, WIDTH
from svlm_jax.model.qwen_vl import init_params
from svlm_jax.storage import Place

SEED = 0
SETTINGS = {  # as configs/sft_match.py trains it; what is likeliest is said, and saying it again costs nothing
    "fps": 2.0,
    "max_pixels": HEIGHT * WIDTH,
    "max_new_tokens": 28,
    "text_sink": 64,
    "text_sliding": 448,
    "text_refresh": 8,
    "query": QUERY,
    "temperature": 0.0,
    "repetition_penalty": 1.0,
}


def write(folder: Path) -> Place:
    """The model's directory, which must not be there yet."""
    with tempfile.TemporaryDirectory() as scratch:
        write_tokenizer(make(corpus(), VOCABULARY), Path(scratch))
        write_stream_settings(Path(scratch), SETTINGS)
        params = init_params(match(), jax.random.key(SEED))
        return save_params(params, match(), folder, tokenizer_files_from=scratch)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m svlm_jax.demo.make_match_model FOLDER")
    print(write(Path(sys.argv[1])), file=sys.stderr)
