"""Every setting of the project, as frozen dataclasses that are checked on construction."""

import dataclasses
import math
from fractions import Fraction
from typing import Literal

from svlm_jax.errors import UserError

Mode = Literal["streaming", "full", "windows", "recompute"]
Positions = Literal["contiguous", "append"]
KeysValues = Literal["int8"]
VisionNorm = Literal["rms", "layer"]
VisionMlp = Literal["swiglu", "quick_gelu", "gelu_tanh"]
Pixels = Literal["clip", "symmetric"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower of Qwen2.5-VL (arXiv 2502.13923, section 2.1.1), and what sets those of Qwen2-VL and Qwen3-VL apart.

    Qwen2-VL (arXiv 2409.12191) has norm "layer", mlp "quick_gelu", no windows and no rate of temporal positions. Qwen3-VL
    (arXiv 2511.21631) has neither windows nor a rate: its tower is SigLIP 2's (norm "layer", mlp "gelu_tanh", learned positions
    beside the rotary ones, a bias in the patch embedding), some of its blocks feed the decoder's first layers (DeepStack, arXiv
    2406.04334), and clips are stamped.
    """

    depth: int  # transformer blocks
    hidden_size: int  # width of a patch's features
    intermediate_size: int  # width of the MLP
    num_heads: int
    out_hidden_size: int  # width after the merger = TextConfig.hidden_size
    fullatt_block_indexes: tuple[int, ...] = ()  # blocks that see the whole grid; the others see windows, where there are any
    patch_size: int = 14  # pixels
    spatial_merge_size: int = 2  # patches a side that the merger joins
    temporal_patch_size: int = 2  # frames a patch spans
    window_size: int | None = 112  # pixels a side of an attention window, beyond whole merged patches none count; None: every block sees all
    tokens_per_second: float = 2  # temporal positions a second of video spans; 0: one position a pair of frames
    in_channels: int = 3
    norm: VisionNorm = "rms"  # of blocks and merger; "layer" has biases
    mlp: VisionMlp = "swiglu"  # of the blocks
    pixels: Pixels = "clip"  # what colours are normalised by: CLIP's statistics, or to [-1, 1]
    patch_bias: bool = False  # whether the patch embedding has one
    position_grid: int = 0  # rows (and columns) of the learned positions, which are stretched over every frame; 0: none
    deepstack_blocks: tuple[int, ...] = ()  # blocks whose merged output is added behind the decoder's first layers, in this order
    stamped: bool = False  # whether every pair of frames is a visual of its own behind its time in words (`streaming.prompt.stamp_text`)
    rms_norm_eps: float = 1e-6  # of layer norms as well

    def __post_init__(self):
        _require(self.hidden_size % self.num_heads == 0, f"vision hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}")
        _require(self.head_dim % 4 == 0, f"vision head size {self.head_dim} must be a multiple of 4 for two-axis rotary positions")
        _require(
            self.window_size is None or self.window_size >= self.merged_patch_size,
            f"vision window_size {self.window_size} is less than {self.merged_patch_size} pixels (one merged patch)",
        )
        _require(self.norm in ("rms", "layer"), f"vision norm {self.norm!r} is unknown: rms or layer")
        _require(self.mlp in ("swiglu", "quick_gelu", "gelu_tanh"), f"vision mlp {self.mlp!r} is unknown: swiglu, quick_gelu or gelu_tanh")
        _require(self.pixels in ("clip", "symmetric"), f"vision pixels {self.pixels!r} is unknown: clip or symmetric")
        _require(
            all(0 <= block < self.depth for block in self.deepstack_blocks) and list(self.deepstack_blocks) == sorted(set(self.deepstack_blocks)),
            f"vision deepstack_blocks {self.deepstack_blocks} must be numbers of the {self.depth} blocks, in order",
        )
        _require(
            not (self.stamped and self.tokens_per_second),
            f"vision tokens_per_second {self.tokens_per_second} has no meaning in stamped clips, where every grid is a visual of its own: set it to 0",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_inputs(self) -> int:
        """Projections into the MLP: gate and up, or one."""
        return 2 if self.mlp == "swiglu" else 1

    def sees_all(self, block: int) -> bool:
        """Whether block number `block` attends over the whole grid."""
        return self.window_size is None or block in self.fullatt_block_indexes

    @property
    def merged_patch_size(self) -> int:
        """Pixels a side that one token of the decoder covers."""
        return self.patch_size * self.spatial_merge_size

    @property
    def patch_features(self) -> int:
        """Numbers in one flattened patch (colour, frame, y, x)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The Qwen2 and Qwen2.5 decoder with three-axis rotary positions (M-RoPE), and what sets Qwen3's apart (arXiv 2505.09388).

    Qwen3 norms queries and keys, has no biases, and deals its frequency pairs out to the three axes in turn.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    mrope_section: tuple[int, int, int]  # frequency pairs turned by the (time, row, column) axis
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    qkv_bias: bool = True
    qk_norm: bool = False  # an RMS norm over each head of queries and keys, before they are rotated
    mrope_interleaved: bool = False  # pairs go to time, row, column, time, ... while an axis has some left, and to time from then on

    def __post_init__(self):
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads {self.num_key_value_heads}",
        )
        _require(
            2 * sum(self.mrope_section) == self.head_dim,
            f"mrope_section {self.mrope_section} must sum to half the head size ({self.head_dim} / 2)",
        )
        _require(
            all(self.mrope_axes.count(axis) == pairs for axis, pairs in enumerate(self.mrope_section)),
            f"mrope_section {self.mrope_section} cannot be interleaved: rows and columns reach past the last of {len(self.mrope_axes)} pairs",
        )

    @property
    def mrope_axes(self) -> tuple[int, ...]:
        """The axis (0 time, 1 row, 2 column) that turns each frequency pair."""
        if not self.mrope_interleaved:
            return tuple(axis for axis, pairs in enumerate(self.mrope_section) for _ in range(pairs))
        return tuple(pair % 3 if pair < 3 * self.mrope_section[pair % 3] else 0 for pair in range(sum(self.mrope_section)))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A vision tower, a decoder, and nothing else: token ids come from the tokenizer (`streaming.prompt.PromptLayout`)."""

    vision: VisionConfig
    text: TextConfig
    name: str = "custom"

    def __post_init__(self):
        _require(
            self.vision.out_hidden_size == self.text.hidden_size,
            f"vision out_hidden_size {self.vision.out_hidden_size} differs from text hidden_size {self.text.hidden_size}",
        )
        _require(
            len(self.vision.deepstack_blocks) <= self.text.num_hidden_layers,
            f"vision deepstack_blocks {self.vision.deepstack_blocks} are more than the decoder's {self.text.num_hidden_layers} layers",
        )


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """How a stream is watched and spoken about. Windows are in rounds, texts in tokens, times in seconds."""

    vision_window: int = 16
    text_window: int = 16
    text_sink: int | None = 512  # first words of the previous text that are kept for ever
    text_sliding: int | None = 512  # the last text_sliding - 1 words are kept as well
    text_refresh: int = 0  # rounds from one fresh reading of the previous text to the next; 0: its words keep the keys and values they were said with
    max_new_tokens: int = 20
    chunk_seconds: float = 1.0
    fps: float = 2.0
    mode: Mode = "streaming"
    positions: Positions = "contiguous"
    query: str = "Commentate on this match"
    previous_text: str = ""
    temperature: float = 0.9  # 0 is greedy
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.05
    seed: int = 0
    capacity_rounds: int = 64  # mode "full": rounds that fit before the stream must end
    text_capacity: int = 8192  # words that fit when text_sink and text_sliding are both off
    question_capacity: int = 64  # tokens of a question in mid-stream, for which every round has room; 0: none can be asked
    max_pixels: int = 602_112  # pixels of a frame after resizing, at most
    kv: KeysValues | None = None  # keys and values in eight bits, a scale for each token and head; None: in the type of the computation

    def __post_init__(self):
        _require(self.vision_window >= 1, f"--vision-window must be at least 1 round, not {self.vision_window}")
        _require(self.text_window >= 2, f"--text-window must be at least 2 rounds, not {self.text_window}")
        _require(
            (self.text_sink is None) == (self.text_sliding is None),
            "--text-sink and --text-sliding must be given both or be off both",
        )
        _require(self.text_sink is None or self.text_sink >= 0, f"--text-sink must not be negative, but is {self.text_sink}")
        _require(self.text_sliding is None or self.text_sliding >= 1, f"--text-sliding must be at least 1 token, not {self.text_sliding}")
        _require(self.text_refresh >= 0, f"--text-refresh must not be negative, but is {self.text_refresh}")
        _require(self.max_new_tokens >= 1, f"--max-new-tokens must be at least 1, not {self.max_new_tokens}")
        _require(self.mode in ("streaming", "full", "windows", "recompute"), f"--mode {self.mode!r} is unknown: streaming, full, windows or recompute")
        _require(self.positions in ("contiguous", "append"), f"--positions {self.positions!r} is unknown: contiguous or append")
        _require(self.mode == "streaming" or self.positions == "contiguous", f"--positions append needs --mode streaming, not {self.mode}")
        _require(math.isfinite(self.fps) and self.fps > 0, f"--fps must be positive, not {self.fps}")
        _require(math.isfinite(self.chunk_seconds) and self.chunk_seconds > 0, f"--chunk must be positive, not {self.chunk_seconds}")
        _require(self.temperature >= 0, f"--temperature must not be negative, but is {self.temperature}")
        _require(self.top_k is None or self.top_k >= 1, f"--top-k must be at least 1, not {self.top_k}")
        _require(self.top_p is None or 0 < self.top_p <= 1, f"--top-p must be in (0, 1], not {self.top_p}")
        _require(self.repetition_penalty > 0, f"--repetition-penalty must be positive, not {self.repetition_penalty}")
        _require(-(2**63) <= self.seed < 2**63, f"--seed must be an integer of 64 bits, not {self.seed}")
        _require(self.text_capacity >= 0, f"--text-capacity must not be negative, but is {self.text_capacity}")
        _require(self.capacity_rounds >= 2, f"--capacity-rounds must be at least 2, not {self.capacity_rounds}")
        _require(self.question_capacity >= 0, f"question_capacity must not be negative, but is {self.question_capacity}")
        _require(self.kv in (None, "int8"), f"--kv {self.kv!r} is unknown: int8")
        self.frames_per_round  # noqa: B018  (raises where fps and chunk_seconds do not fit)

    @property
    def frames_per_round(self) -> int:
        """Frames that one round shows: fps x chunk_seconds, a whole number >= 1."""
        count = self.fps * self.chunk_seconds
        if count < 0.5 or abs(count - round(count)) > 1e-6:
            nearest = max(1, round(count)) / self.fps
            raise UserError(
                f"--fps {self.fps:g} x --chunk {self.chunk_seconds:g} gives {count:g} frames a round, not a whole number: "
                f"the nearest that works is --chunk {nearest:g}"
            )
        return round(count)

    @property
    def grids_per_round(self) -> int:
        """Temporal grids of a round's clip: pairs of frames, an odd last frame repeated."""
        return -(-self.frames_per_round // 2)

    def temporal_step(self, tokens_per_second: float) -> Fraction:
        """Positions between two temporal grids: tokens_per_second x 2 frames / fps; 1 where the family has no such rate (0)."""
        if not tokens_per_second:
            return Fraction(1)
        return (Fraction(tokens_per_second) * 2 / Fraction(self.fps).limit_denominator(1000)).limit_denominator(1 << 12)
