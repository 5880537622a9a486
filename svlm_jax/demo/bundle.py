"""What a fresh install shows: a model that this project trained on simulated matches, and the beginning of a match that it has not seen.

The video, and what really happens in it, are made again by

    svlm demo match --minutes 1.25 --seed 2 --out svlm_jax/demo/match.mp4

Seeds below 1000 are never trained on. In 75 seconds no seed has a goal, as the first is due after two minutes; seed 2 is the first of
1, 2, 3, ... with all fourteen other kinds of events. What the model says about it had no part in the choice.
"""

from pathlib import Path

FOLDER = Path(__file__).parent


def model_path() -> Path:
    """The bundled model's directory, in Hugging Face's form. `docs/match.md` has how it was trained."""
    return FOLDER / "commentator"


def clip_path() -> Path:
    """The bundled video; `match.jsonl` beside it is its truth."""
    return FOLDER / "match.mp4"
