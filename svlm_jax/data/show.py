"""One sample as a page of HTML: each turn's frames, and its tokens with those marked that the model has to predict."""

import base64
import html
import io
import itertools
from pathlib import Path

import numpy as np
from PIL import Image

from svlm_jax.data.annotations import Annotation
from svlm_jax.data.batch import IGNORED
from svlm_jax.data.samples import Sample, Script
from svlm_jax.streaming.prompt import PromptLayout
from svlm_jax.tokenizer import Tokenizer
from svlm_jax.types import UInt8

STYLE = """
body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 70em; color: #222 }
h1 { font-size: 1.3em } dt { float: left; clear: left; width: 9em; color: #777 } dd { margin-left: 9em }
.turn { border-top: 1px solid #ddd; padding: .6em 0 } img { height: 120px; margin-right: 4px }
.token { font-family: monospace; white-space: pre-wrap; background: #f1f1f1; border-radius: 3px; margin: 1px; padding: 0 2px }
.label { background: #ffd9a0; font-weight: bold } .vision { background: #d6e6ff }
"""
BROKEN = "\N{REPLACEMENT CHARACTER}"


def _picture(frame: UInt8[np.ndarray, "h w 3"]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _tokens(ids: np.ndarray, labels: np.ndarray, tokenizer: Tokenizer, layout: PromptLayout) -> str:
    """Runs of vision pads as one; line breaks shown as signs."""
    out, index = [], 0
    while index < len(ids):
        stop = index + 1
        if ids[index] == layout.video_pad:
            while stop < len(ids) and ids[stop] == layout.video_pad:
                stop += 1
            out.append(f'<span class="token vision">&lt;|video_pad|&gt; &times; {stop - index}</span>')
        else:
            text = tokenizer.decode([int(ids[index])], skip_special=False).replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
            kind = "token" if labels[index] == IGNORED else "token label"
            out.append(f'<span class="{kind}" title="{int(ids[index])}">{html.escape(text if BROKEN not in text else f"[{int(ids[index])}]")}</span>')
        index = stop
    return "".join(out)


def page(
    name: str, annotation: Annotation, script: Script, sample: Sample, clips: list[UInt8[np.ndarray, "F h w 3"]], tokenizer: Tokenizer
) -> str:
    """The whole page. `clips` are the frames of each turn."""
    layout = PromptLayout.from_tokenizer(tokenizer)
    starts = sample.tokens == layout.im_start
    users = np.flatnonzero(starts[:-1] & (sample.tokens[1:] == layout.user_head[1]))  # where each turn begins
    bounds = [0, *users.tolist(), len(sample.tokens)]
    parts = [_tokens(sample.tokens[a:b], sample.labels[a:b], tokenizer, layout) for a, b in itertools.pairwise(bounds)]
    labelled = int(np.sum(sample.labels != IGNORED))
    height, width = clips[0].shape[1:3]
    facts = {
        "video": annotation.video,
        "seconds": f"{annotation.start:g} to {annotation.end:g}, {len(script.turns)} turns",
        "frames": f"{width} x {height} pixels, {sum(map(len, clips))} of them",
        "tokens": f"{len(sample.tokens):,}, {len(sample.places):,} of them video and {labelled:,} labels",
        "never said": f"{script.words_left} words, {script.questions_left} questions",
        "query": annotation.query,
        **{key: str(value) for key, value in annotation.other},
    }
    listed = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(value) or '&nbsp;'}</dd>" for key, value in facts.items())
    turns = "".join(
        f'<div class="turn"><div>{"".join(map(_picture, frames))}</div><div>{part}</div></div>' for frames, part in zip(clips, parts[1:], strict=True)
    )
    head = f'<!doctype html><html><head><meta charset="utf-8"><title>{html.escape(name)}</title><style>{STYLE}</style></head>'
    return f'{head}<body><h1>{html.escape(name)}</h1><dl>{listed}</dl><div class="turn">{parts[0]}</div>{turns}</body></html>\n'


def write_page(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
