"""The cache's contract in plain Python: which tokens survive each round, and at which positions.

It keeps the whole token list, finds turns by their tokens and recomputes every position: written for clarity, not for speed.
`python tests/contract.py TRACE...` shows it agree with recorded traces. A fixed-shape cache that disagrees is wrong, unless a
caption or a query holds a structural token (`Time`, a leading newline): there the cache's structural reading is right.
"""

import dataclasses
import sys
from fractions import Fraction

from svlm_jax.config import StreamConfig
from svlm_jax.streaming.prompt import PromptLayout

TAIL = 2  # " ...<|im_end|>": the last two tokens of a turn never join the previous text


@dataclasses.dataclass
class Contract:
    """One stream. `ids` is the sequence; `append_round` and `close_turn` grow it, `evict` cuts it."""

    layout: PromptLayout
    config: StreamConfig
    grid: tuple[int, int, int]  # of a clip's visual, in merged patches
    step: Fraction  # positions between temporal grids
    time: int  # the token that every time text starts with
    stamp: int | None = None  # the one that every stamp starts with, where each pair of frames is a visual behind its stamp
    visuals: int = 1  # of a clip
    ids: list[int] = dataclasses.field(default_factory=list)
    round: int = 0
    cached: int = 0

    def _block(self, head: tuple[int, ...], end: int, start: int = 0) -> tuple[int, int]:
        """[first, last] of the first run that opens with `head` at or after `start` and closes with `end`."""
        for i in range(start, len(self.ids) - len(head) + 1):
            if tuple(self.ids[i : i + len(head)]) == head:
                return i, self.ids.index(end, i + len(head))
        raise ValueError("no such block")

    def _clip(self, start: int = 0) -> tuple[int, int]:
        """[first, last] of the first clip at or after `start`, its stamps included."""
        first = last = self.ids.index(self.layout.vision_start, start)
        while self.stamp is not None and self.ids[first] != self.stamp:
            first -= 1
        for _ in range(self.visuals):
            last = self.ids.index(self.layout.vision_end, last + 1)
        return first, last

    def _with_newline(self, span: tuple[int, int]) -> tuple[int, int]:
        first, last = span
        return first, last + (last + 1 < len(self.ids) and self.ids[last + 1] == self.layout.newline)

    def _drop(self, span: tuple[int, int]) -> None:
        del self.ids[span[0] : span[1] + 1]

    def evict(self) -> None:
        """What leaves before the next round is appended."""
        p, c, before = self.layout, self.config, len(self.ids)
        assistant = p.assistant_head[:2]
        if self.round >= c.text_window:
            first, last = self._block(p.assistant_head, p.im_end)
            words = self.ids[first + len(p.assistant_head) : last + 1 - TAIL]
            _, close = self._block(p.previous_text_head, p.im_end)
            if words:
                body = first + len(p.assistant_head)
                self.ids = self.ids[:close] + words + self.ids[close:body] + self.ids[body + len(words) :]
            if c.vision_window > c.text_window:
                timed = [i for i, token in enumerate(self.ids) if token == self.time][-c.text_window]
                self.ids = self.ids[:timed] + self.ids[self._clip(timed)[0] :]
            turns = [i for i in range(len(self.ids) - 1) if tuple(self.ids[i : i + 2]) == assistant]
            self._drop(self._with_newline(self._block(assistant, p.im_end, turns[-c.text_window])))
        if self.round >= c.vision_window and c.vision_window < c.text_window:
            self._drop(self._with_newline(self._clip()))
        if self.round >= max(c.text_window, c.vision_window):
            self._drop(self._with_newline(self._block(p.user_head[:2], p.im_end)))
        if self.round > 0 and c.text_sink is not None and c.text_sliding is not None:
            first, last = self._with_newline(self._block(p.previous_text_head, p.im_end))
            cut_first = first + len(p.previous_text_head) + c.text_sink
            cut_last = last - c.text_sliding - 1
            if cut_first <= cut_last:
                self._drop((cut_first, cut_last))
        self.cached -= before - len(self.ids)

    def append_round(self, prompt: list[int]) -> None:
        self.ids = self.ids + prompt

    def close_turn(self, turn: list[int]) -> None:
        """A turn cut at its budget is closed; its last sampled token, and that closing, are run with the next round."""
        self.ids = self.ids + turn
        self.cached = len(self.ids) - 1
        if self.ids[-1] != self.layout.im_end:
            self.ids.append(self.layout.im_end)
        self.round += 1

    def positions(self, ids: list[int] | None = None) -> list[list[Fraction]]:
        """Contiguous three-axis positions: text counts on, a visual spans its grid, text resumes at the maximum plus one."""
        (t, h, w), ids = self.grid, self.ids if ids is None else ids
        out: list[list[Fraction]] = [[], [], []]
        end, i = Fraction(0), 0
        while i < len(ids):
            if ids[i] == self.layout.video_pad:
                for a in range(t):
                    for b in range(h):
                        for c in range(w):
                            for axis, at in zip(out, (a * self.step, b, c), strict=True):
                                axis.append(end + at)
                end, i = end + max((t - 1) * self.step, h - 1, w - 1) + 1, i + t * h * w
            else:
                for axis in out:
                    axis.append(end)
                end, i = end + 1, i + 1
        return out


def replay(trace: dict) -> int:
    """Checks the contract against a recorded trace; gives its number of rounds."""
    from oracle import tokenizer
    from replay_trace import stream_config

    case, vision = trace["case"], trace["config"]["vision_config"]
    config, words = stream_config(case), tokenizer()
    side = vision["patch_size"] * vision.get("spatial_merge_size", 2)
    grid = (config.grids_per_round, case["height"] // side, case["width"] // side)
    step = config.temporal_step(vision.get("tokens_per_second", 0))
    contract = Contract(PromptLayout.from_tokenizer(words), config, grid, step, words.encode("Time")[0])
    offset = Fraction(0)
    for index, record in enumerate(trace["rounds"]):
        if index:
            contract.evict()
        held = len(contract.ids)
        assert record["sequence_in"][:held] == contract.ids, f"round {index}: survivors differ"
        contract.append_round(record["sequence_in"][held:])
        cached = 0 if config.mode == "recompute" else contract.cached
        assert cached == record["kv_len_in"], f"round {index}: cached {cached}, not {record['kv_len_in']}"
        if config.positions == "append":
            got = [[p + offset for p in axis] for axis in contract.positions(contract.ids[cached:])]
            offset = got[0][-1] + len(record["generated"])
        else:
            got = contract.positions()
        assert all(abs(a - b) < 1e-3 for ours, theirs in zip(got, record["position_ids"], strict=True) for a, b in zip(ours, theirs, strict=True))
        contract.close_turn(record["generated"])
    return len(trace["rounds"])


if __name__ == "__main__":
    from oracle import read_json

    for path in sys.argv[1:]:
        print(f"{path}: {replay(read_json(path))} rounds agree")
