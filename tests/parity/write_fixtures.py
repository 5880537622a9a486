"""Writes tests/data/checkpoints: a small random checkpoint of each family, and the logits that transformers gives. Needs PyTorch.

    python tests/parity/write_fixtures.py [FAMILY...]
"""

import gzip
import json
import shutil
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "parity")]

import test_transformers as parity  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from prompts import PARTS, prompts  # noqa: E402

from svlm_jax.checkpoints.hub_config import read_config  # noqa: E402

KEPT = ("text", "image", "clip")
IDS = range(0, 320, 20)  # the logits that are kept


def main() -> None:
    for family in sys.argv[1:] or parity.CLASSES:
        folder = TESTS / "data" / "checkpoints" / family
        shutil.rmtree(folder, ignore_errors=True)
        parity.theirs(family, layers=2).to(torch.bfloat16).save_pretrained(folder)
        (folder / "generation_config.json").unlink()
        (folder / "model.safetensors").chmod(0o644)
        model = parity.model_class(family).from_pretrained(folder, dtype=torch.float32).eval()  # its frequencies never were in bfloat16
        logits = {name: parity.their_logits(model, read_config(folder), prompts(family)[name])[:, list(IDS)].round(5).tolist() for name in KEPT}
        said = {"transformers": transformers.__version__, "torch": torch.__version__, "parts": PARTS, "ids": list(IDS), "logits": logits}
        (folder / "expected.json.gz").write_bytes(gzip.compress(json.dumps(said).encode(), mtime=0))


if __name__ == "__main__":
    main()
