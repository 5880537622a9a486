"""The plain causal forward under jit: logits of a chat prompt with a picture, of the bundled model. A few seconds on a CPU.

    python examples/forward_jit.py
"""

import functools

import jax
import numpy as np

import svlm_jax
from svlm_jax.data.chat import Image, lay_out
from svlm_jax.model.qwen_vl import forward
from svlm_jax.streaming.prompt import PromptLayout

model = svlm_jax.load()
picture = Image(np.random.default_rng(0).integers(0, 256, (3, 84, 112), dtype=np.uint8))
layout = PromptLayout.from_tokenizer(model.tokenizer)
prompt = lay_out(["<|im_start|>user\n", picture, "What is this?<|im_end|>\n"], model.tokenizer, layout, model.config.vision)

run = jax.jit(functools.partial(forward, config=model.config, denominator=prompt.unit))
visuals = [clip[None] for clip in prompt.visuals]
logits = run(model.params, tokens=prompt.tokens[None], positions=prompt.positions[None], visuals=visuals, places=prompt.places[None])
best = model.tokenizer.decode([int(logits[0, -1].argmax())])
print(f"{logits.shape[1]} tokens, {logits.shape[2]} logits each; the likeliest next token is {best!r}")
