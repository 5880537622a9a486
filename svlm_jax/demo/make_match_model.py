"""Writes the untrained model that commentary of matches is learnt by: sizes, tokenizer, random weights.

    python -m svlm_jax.demo.make_match_model FOLDER
"""

import sys
import tempfile
from pathlib import Path

import jax

from svlm_jax.checkpoints.save import save_params
from svlm_jax.configs.models import match
from svlm_jax.demo.make_tokenizer import make
from svlm_jax.demo.make_tokenizer import write as write_tokenizer
from svlm_jax.demo.match_vocabulary import VOCABULARY, corpus
from svlm_jax.model.qwen_vl import init_params

SEED = 0


def write(folder: Path) -> Path:
    """The model's directory, which must not be there yet."""
    with tempfile.TemporaryDirectory() as scratch:
        write_tokenizer(make(corpus(), VOCABULARY), Path(scratch))
        params = init_params(match(), jax.random.key(SEED))
        return save_params(params, match(), folder, tokenizer_files_from=scratch)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m svlm_jax.demo.make_match_model FOLDER")
    print(write(Path(sys.argv[1])), file=sys.stderr)
