"""`streaming.json` beside a model's weights: the settings that it was trained for, which streams take where nothing else is asked for.

    {"fps": 2, "max_pixels": 75264, "text_sink": 64, "text_sliding": 448, "temperature": 0}

Its keys are fields of `StreamConfig`. Checkpoints of others have no such file.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from svlm_jax.config import StreamConfig
from svlm_jax.errors import UserError
from svlm_jax.storage import Place

FILE = "streaming.json"


def read_stream_settings(folder: Place) -> dict[str, Any]:
    """The settings beside the weights; none where there is no file. UserError for a file that is none, or names what is no setting."""
    file = folder / FILE
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        unknown = sorted(str(name) for name in set(settings) - {field.name for field in dataclasses.fields(StreamConfig)})
        if not unknown:
            StreamConfig(**settings)
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}): mend it, or take it away") from error
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    if unknown:
        raise UserError(f"{file}: there is no setting {unknown[0]}: take it out")
    return settings


def write_stream_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Puts them beside the weights."""
    StreamConfig(**settings)
    (folder / FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
