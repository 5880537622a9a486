"""The plain forward under vmap: how far a word's logit moves when each of the words before it is replaced. A few seconds on a CPU.

    python examples/forward_vmap.py
"""

import jax
import numpy as np

import svlm_jax
from svlm_jax.model.qwen_vl import forward

model = svlm_jax.load()
ids = np.asarray(model.tokenizer.encode("A long pass to the right, and"), np.int32)
positions = np.repeat(np.arange(len(ids), dtype=np.int32)[None, :, None], 3, axis=2)
blank = model.tokenizer.encode(" ...")[0]


def last_logits(tokens):
    return forward(model.params, model.config, tokens[None], positions)[0, -1]


changed = np.where(np.eye(len(ids), dtype=bool), blank, ids)  # row i lacks word i
whole = jax.jit(last_logits)(ids)
without = jax.jit(jax.vmap(last_logits))(changed)
word = int(whole.argmax())
for token, logits in zip(ids, without, strict=True):
    print(f"{float(logits[word] - whole[word]):+8.3f} without {model.tokenizer.decode([int(token)])!r}")
