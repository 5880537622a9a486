"""The original system, emulated in NumPy and float64 from its settings alone: a second truth beside the recorded traces.

It shares no code with the engine, and is as unlike it as can be: one list of tokens that grows and is cut, keys that are kept
unrotated and all rotated again for every new token, and positions that are counted anew every round. Where a caption holds
a token of the structure (`Time`, a leading newline), it reads turns by where they stand, as the engine does.

    python tests/original.py TRACE...    compares it with recorded traces
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import qwen_vocabulary
import recipe
import tokenizers
from scipy.special import erf, expit

MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
IM_END, VISION_START, VISION_END, VIDEO_PAD = 151645, 151652, 151653, 151656


class Role(NamedTuple):
    """What a token is: of which round (-1: of none), and which part of it."""

    round: int
    part: str  # "fixed", "word", "closing"; "user", "time", "clip", "query", "close"; "assistant", "said", "newline"


class Weights:
    """Parameters by name, made from the recipe when first asked for."""

    def __init__(self, candidates: list[int]):
        self.candidates, self.found = candidates, {}

    def __call__(self, name: str, *shape: int) -> np.ndarray:
        if name not in self.found:
            self.found[name] = recipe.weight(name, shape, self.candidates).astype(np.float64)
        return self.found[name]

    def linear(self, x: np.ndarray, name: str, size: int, *, bias: bool = True) -> np.ndarray:
        y = x @ self(f"{name}.weight", size, x.shape[-1]).T
        return y + self(f"{name}.bias", size) if bias else y

    def norm(self, x: np.ndarray, name: str, epsilon: float) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + epsilon) * self(f"{name}.weight", x.shape[-1])


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def turn(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """x [n, heads, H] rotated by `angle` [n, H / 2]; feature i is paired with i + H / 2."""
    a, b = np.split(x, 2, -1)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def see(w: Weights, config: dict[str, Any], frames: np.ndarray) -> np.ndarray:
    """Vision features [grids * rows * columns, D] of frames [F, 3, height, width]."""
    c, base = config["vision_config"], "model.visual."
    p, m, e, heads = c["patch_size"], c["spatial_merge_size"], c["hidden_size"], c["num_heads"]
    if len(frames) % 2:
        frames = np.concatenate([frames, frames[-1:]])
    x = (frames / 255 - MEAN[:, None, None]) / STD[:, None, None]
    rows, columns = x.shape[2] // p, x.shape[3] // p
    x = x.reshape(len(x) // 2, 2, 3, rows // m, m, p, columns // m, m, p).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    x = x.reshape(len(x), rows * columns, -1)
    row, column = np.mgrid[:rows, :columns]
    row, column = (a.reshape(rows // m, m, columns // m, m).swapaxes(1, 2).ravel() for a in (row, column))
    quarter = e // heads // 4
    frequency = 10_000.0 ** (-np.arange(quarter) / quarter)
    angle = np.concatenate([row[:, None] * frequency, column[:, None] * frequency], 1)
    side = c["window_size"] // m // p * m
    window = row // side * columns + column // side
    together = window[:, None] == window
    x = x @ w(base + "patch_embed.proj.weight", e, 3, 2, p, p).reshape(e, -1).T
    for i in range(c["depth"]):
        name, out = f"{base}blocks.{i}.", []
        for grid in x:
            qkv = w.linear(w.norm(grid, name + "norm1", 1e-6), name + "attn.qkv", 3 * e).reshape(-1, 3, heads, e // heads)
            q, k, v = turn(qkv[:, 0], angle), turn(qkv[:, 1], angle), qkv[:, 2]
            scores = np.einsum("qnh,knh->nqk", q, k) / np.sqrt(e // heads)
            if i not in c["fullatt_block_indexes"]:
                scores = np.where(together, scores, -np.inf)
            out.append(np.einsum("nqk,knh->qnh", softmax(scores), v).reshape(-1, e))
        x = x + w.linear(np.array(out), name + "attn.proj", e)
        y = w.norm(x, name + "norm2", 1e-6)
        gate, up = (w.linear(y, f"{name}mlp.{n}_proj", c["intermediate_size"]) for n in ("gate", "up"))
        x = x + w.linear(gate * expit(gate) * up, name + "mlp.down_proj", e)
    x = w.norm(x, base + "merger.ln_q", 1e-6).reshape(-1, m * m * e)
    x = w.linear(x, base + "merger.mlp.0", m * m * e)
    return w.linear(x * (1 + erf(x / np.sqrt(2))) / 2, base + "merger.mlp.2", c["out_hidden_size"])


class Original:
    """One stream: the visible sequence (`ids`, `roles`, `inputs`), and keys and values of its first `cached` tokens."""

    def __init__(self, trace: dict[str, Any]):
        self.case, self.config, self.candidates = trace["case"], trace["config"], trace["candidate_token_ids"]
        self.weights = Weights(self.candidates)
        folder = qwen_vocabulary.directory(Path.home() / ".cache" / "svlm-jax" / "qwen-vocabulary")
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        c, layers = self.config, self.config["num_hidden_layers"]
        self.head_dim, self.kv_heads = c["hidden_size"] // c["num_attention_heads"], c["num_key_value_heads"]
        self.frames = int(self.case["fps"] * self.case["chunk_duration"])
        pixels = c["vision_config"]["patch_size"] * c["vision_config"]["spatial_merge_size"]
        self.grid = (-(-self.frames // 2), self.case["height"] // pixels, self.case["width"] // pixels)
        self.ids: list[int] = []
        self.roles: list[Role] = []
        self.inputs = np.zeros((0, c["hidden_size"]))  # embeddings, vision features put in
        self.keys = [np.zeros((0, self.kv_heads, self.head_dim))] * layers
        self.values = [np.zeros((0, self.kv_heads, self.head_dim))] * layers
        self.at = np.zeros((0, 3))  # positions of the cached tokens
        self.cached = self.end = 0
        self.margin = np.inf  # the smallest gap between the best and the second-best token so far
        names = ("weight", "vocab_size", "hidden_size")
        self.embedding = self.weights(f"model.language_model.embed_tokens.{names[0]}", *(c[n] for n in names[1:]))
        self.head = self.embedding if c["tie_word_embeddings"] else self.weights("lm_head.weight", *(c[n] for n in names[1:]))
        self.rows = np.flatnonzero(self.head.any(1))

    def add(self, ids: list[int], roles: list[Role], features: np.ndarray | None = None) -> None:
        rows = self.embedding[ids]
        if features is not None:
            rows[np.array(ids) == VIDEO_PAD] = features
        self.inputs = np.concatenate([self.inputs, rows])
        self.ids, self.roles = self.ids + ids, self.roles + roles

    def select(self, order: list[int]) -> None:
        """The sequence becomes its tokens number order[0], order[1] ...; what is cached of them stays cached."""
        held = [i for i in order if i < self.cached]
        assert held == order[: len(held)], "what has not been run stands last"
        self.ids, self.roles, self.inputs = [self.ids[i] for i in order], [self.roles[i] for i in order], self.inputs[order]
        self.keys, self.values, self.at = [k[held] for k in self.keys], [v[held] for v in self.values], self.at[held]
        self.cached = len(held)

    def evict(self, r: int) -> None:
        """What leaves before round r, by the rules: old words, old clips, old rounds, the middle of the words."""
        text, vision = self.case["text_round"], self.case["window_size"]
        order, tags = list(range(len(self.ids))), self.roles
        said = [i for i in order if tags[i] == (r - text, "said")]
        gone = {i for i in order if tags[i].round == r - text >= 0 and tags[i].part in ("assistant", "said", "newline")}
        if r >= text:
            for i in said[:-2]:
                self.roles[i] = Role(-1, "word")
            closing = tags.index(Role(-1, "closing"))
            order = [*order[:closing], *said[:-2], *(i for i in order[closing:] if i not in said[:-2])]
            gone -= set(said[:-2])
            if vision > text:
                gone |= {i for i in order if tags[i] == (r - text, "time")}
        if r >= vision and text > vision:
            gone |= {i for i in order if tags[i] == (r - vision, "clip")}
        oldest = r - max(text, vision)
        gone |= {i for i in order if tags[i].round == oldest >= 0 and tags[i].part in ("user", "time", "clip", "query", "close")}
        words = [i for i in order if tags[i].part == "word"]
        sink, sliding = self.case["text_sink"], self.case["text_sliding_window"]
        if sink is not None:
            gone |= set(words[sink : max(sink, len(words) - sliding + 1)])
        self.select([i for i in order if i not in gone])

    def positions(self, ids: list[int]) -> np.ndarray:
        """[n, 3] from 0 on: text counts, a clip spans its grid, text resumes behind the largest."""
        (t, h, w), rate = self.grid, self.config["vision_config"]["tokens_per_second"]
        clip = np.stack(np.meshgrid(np.arange(t) * (rate * 2 / self.case["fps"]), np.arange(h), np.arange(w), indexing="ij"), -1).reshape(-1, 3)
        out, end, i = [], 0.0, 0
        while i < len(ids):
            out.append(end + clip if ids[i] == VIDEO_PAD else np.full((1, 3), end))
            i += len(out[-1])
            end = out[-1].max() + 1
        return np.concatenate(out)

    def run(self, positions: np.ndarray) -> np.ndarray:
        """Runs all tokens that are not cached; `positions` are those of the whole sequence. Gives the logits of the last token."""
        c, w, x = self.config, self.weights, self.inputs[self.cached :]
        n, heads = len(x), c["num_attention_heads"]
        frequency = float(c["rope_theta"]) ** (-np.arange(self.head_dim // 2) / (self.head_dim // 2))
        angle = positions[:, np.repeat([0, 1, 2], c["rope_scaling"]["mrope_section"])] * frequency
        past = np.arange(len(positions)) <= np.arange(self.cached, self.cached + n)[:, None]
        for i in range(c["num_hidden_layers"]):
            name = f"model.language_model.layers.{i}."
            y = w.norm(x, name + "input_layernorm", c["rms_norm_eps"])
            q = w.linear(y, name + "self_attn.q_proj", heads * self.head_dim).reshape(n, heads, -1)
            k, v = (w.linear(y, f"{name}self_attn.{s}_proj", self.kv_heads * self.head_dim).reshape(n, self.kv_heads, -1) for s in "kv")
            self.keys[i], self.values[i] = np.concatenate([self.keys[i], k]), np.concatenate([self.values[i], v])
            k, v = (np.repeat(a, heads // self.kv_heads, 1) for a in (turn(self.keys[i], angle), self.values[i]))
            scores = np.einsum("qnh,knh->nqk", turn(q, angle[self.cached :]), k) / np.sqrt(self.head_dim)
            mixed = np.einsum("nqk,knh->qnh", softmax(np.where(past, scores, -np.inf)), v).reshape(n, -1)
            x = x + w.linear(mixed, name + "self_attn.o_proj", c["hidden_size"], bias=False)
            y = w.norm(x, name + "post_attention_layernorm", c["rms_norm_eps"])
            gate, up = (w.linear(y, f"{name}mlp.{s}_proj", c["intermediate_size"], bias=False) for s in ("gate", "up"))
            x = x + w.linear(gate * expit(gate) * up, name + "mlp.down_proj", c["hidden_size"], bias=False)
        self.cached, self.at = len(positions), positions
        logits = np.zeros(len(self.head))
        logits[self.rows] = self.head[self.rows] @ w.norm(x[-1], "model.language_model.norm", c["rms_norm_eps"])
        return logits

    def prompt(self, r: int) -> None:
        """Appends round r's prompt."""
        case, chunk = self.case, self.case.get("skip_first_chunk", 0) + r
        pixels = recipe.frames(case["seed"], chunk, self.frames, case["height"], case["width"])
        features = see(self.weights, self.config, pixels)
        time = f"Time={chunk * case['chunk_duration']:.1f}-{(chunk + 1) * case['chunk_duration']:.1f}s"
        pieces = [
            ("<|im_start|>user\n", Role(r, "user")),
            (time, Role(r, "time")),
            ("<|vision_start|>" + "<|video_pad|>" * len(features) + "<|vision_end|>", Role(r, "clip")),
            (case["query"] if r == 0 else "", Role(r, "query")),
            ("<|im_end|>\n", Role(r, "close")),
            ("<|im_start|>assistant\n", Role(r, "assistant")),
        ]
        if r == 0:
            before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>previous text\n"
            closing = ("<|im_end|>\n", Role(-1, "closing"))
            pieces = [(before, Role(-1, "fixed")), (case["previous_text"], Role(-1, "word")), closing, *pieces]
        else:
            pieces = [("\n", Role(r - 1, "newline")), *pieces]
        ids = self.tokenizer.encode("".join(text for text, _ in pieces), add_special_tokens=False).ids
        roles = [role for text, role in pieces for _ in self.tokenizer.encode(text, add_special_tokens=False).ids]
        assert len(ids) == len(roles), "a token spans two parts of the prompt"
        self.add(ids, roles, features)

    def round(self, r: int) -> dict[str, Any]:
        """Round r, as a trace records it."""
        case, append = self.case, self.case["pos_mode"] == "append" and not self.case.get("recompute")
        if r:
            self.evict(r)
        self.prompt(r)
        if case.get("recompute"):
            self.select_nothing()
        held = self.cached
        fresh = self.positions(self.ids[held:] if append else self.ids)
        positions = np.concatenate([self.at, fresh + self.end]) if append else fresh
        record = {"sequence_in": list(self.ids), "kv_len_in": held, "position_ids": positions[held if append else 0 :].T.tolist()}
        generated, logits_cand, seen = [], [], set(self.ids)
        while True:
            logits = self.run(positions)
            logits_cand.append(logits[self.candidates].tolist())
            for i in seen:
                logits[i] = logits[i] / case["repetition_penalty"] if logits[i] > 0 else logits[i] * case["repetition_penalty"]
            generated.append(int(logits.argmax()))
            second, best = np.partition(logits, -2)[-2:]
            self.margin = min(self.margin, best - second)
            self.add(generated[-1:], [Role(r, "said")])
            seen.add(generated[-1])
            if generated[-1] == IM_END or len(generated) == case["max_new_tokens"]:
                break
            positions = np.concatenate([positions, np.full((1, 3), positions[-1, 0] + 1)])
        self.end = positions[-1, 0] + 1
        record |= {"kv_len_out": self.cached, "generated": generated, "logits_cand": logits_cand}
        if generated[-1] != IM_END:
            self.add([IM_END], [Role(r, "said")])
        return record

    def select_nothing(self) -> None:
        """Forgets all keys and values: the whole sequence is run anew."""
        self.keys, self.values, self.at, self.cached = [k[:0] for k in self.keys], [v[:0] for v in self.values], self.at[:0], 0


def emulate(trace: dict[str, Any]) -> tuple[list[dict[str, Any]], float]:
    """`rounds` of a trace from its other keys, and the smallest gap between the best and the second-best token."""
    original = Original(trace)
    rounds = int(trace["case"]["duration"] / trace["case"]["chunk_duration"] + 1e-6)
    return [original.round(r) for r in range(rounds)], original.margin


if __name__ == "__main__":
    from replay_trace import compare

    for path in sys.argv[1:]:
        recorded = json.loads(gzip.decompress(Path(path).read_bytes()))
        produced, margin = emulate(recorded)
        print(f"{path}: {len(produced)} rounds, largest difference of a logit {compare(produced, recorded['rounds']):.1e}, margin {margin:.4f}")
