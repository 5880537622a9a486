"""The sizes of Qwen2.5-VL, Qwen2-VL and Qwen3-VL, as published in each checkpoint's config.json, and small ones."""

from svlm_jax.config import ModelConfig, TextConfig, VisionConfig


def _vision(out: int, intermediate: int = 3420) -> VisionConfig:
    return VisionConfig(
        depth=32,
        hidden_size=1280,
        intermediate_size=intermediate,
        num_heads=16,
        out_hidden_size=out,
        fullatt_block_indexes=(7, 15, 23, 31),
    )


def _text(vocab: int, width: int, mlp: int, layers: int, heads: int, kv_heads: int, *, tied: bool = False) -> TextConfig:
    return TextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        mrope_section=(16, 24, 24),
        tie_word_embeddings=tied,
    )


def qwen2_5_vl_3b() -> ModelConfig:
    """3.75 billion parameters, tied head."""
    return ModelConfig(_vision(2048), _text(151_936, 2048, 11_008, 36, 16, 2, tied=True), "qwen2.5-vl-3b")


def qwen2_5_vl_7b() -> ModelConfig:
    """8.29 billion parameters; StreamingVLM's base."""
    return ModelConfig(_vision(3584), _text(152_064, 3584, 18_944, 28, 28, 4), "qwen2.5-vl-7b")


def qwen2_5_vl_32b() -> ModelConfig:
    """33.5 billion parameters."""
    return ModelConfig(_vision(5120, 3456), _text(152_064, 5120, 27_648, 64, 40, 8), "qwen2.5-vl-32b")


def qwen2_5_vl_72b() -> ModelConfig:
    """73.4 billion parameters."""
    return ModelConfig(_vision(8192, 3456), _text(152_064, 8192, 29_568, 80, 64, 8), "qwen2.5-vl-72b")


def _vision_of_qwen2(out: int) -> VisionConfig:
    return VisionConfig(
        depth=32,
        hidden_size=1280,
        intermediate_size=5120,
        num_heads=16,
        out_hidden_size=out,
        window_size=None,
        tokens_per_second=0,
        norm="layer",
        mlp="quick_gelu",
    )


def qwen2_vl_2b() -> ModelConfig:
    """2.21 billion parameters, tied head."""
    return ModelConfig(_vision_of_qwen2(1536), _text(151_936, 1536, 8960, 28, 12, 2, tied=True), "qwen2-vl-2b")


def qwen2_vl_7b() -> ModelConfig:
    """8.29 billion parameters; LiveCC's base."""
    return ModelConfig(_vision_of_qwen2(3584), _text(152_064, 3584, 18_944, 28, 28, 4), "qwen2-vl-7b")


def _qwen3_vl(vision: VisionConfig, intermediate: int, name: str, *, tied: bool = False) -> ModelConfig:
    text = TextConfig(
        vocab_size=151_936,
        hidden_size=vision.out_hidden_size,
        intermediate_size=intermediate,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        mrope_section=(24, 20, 20),
        mrope_interleaved=True,
        rope_theta=5e6,
        tie_word_embeddings=tied,
        qkv_bias=False,
        qk_norm=True,
    )
    return ModelConfig(vision, text, name)


def _vision_of_qwen3(
    depth: int, width: int, intermediate: int, out: int, deepstack: tuple[int, ...], *, heads: int = 16, position_grid: int = 48
) -> VisionConfig:
    return VisionConfig(
        depth=depth,
        hidden_size=width,
        intermediate_size=intermediate,
        num_heads=heads,
        out_hidden_size=out,
        patch_size=16,
        window_size=None,
        tokens_per_second=0,
        norm="layer",
        mlp="gelu_tanh",
        pixels="symmetric",
        patch_bias=True,
        position_grid=position_grid,
        deepstack_blocks=deepstack,
        stamped=True,
    )


def qwen3_vl_4b() -> ModelConfig:
    """4.44 billion parameters, tied head."""
    return _qwen3_vl(_vision_of_qwen3(24, 1024, 4096, 2560, (5, 11, 17)), 9728, "qwen3-vl-4b", tied=True)


def qwen3_vl_8b() -> ModelConfig:
    """8.77 billion parameters."""
    return _qwen3_vl(_vision_of_qwen3(27, 1152, 4304, 4096, (8, 16, 24)), 12_288, "qwen3-vl-8b")


def tiny(vocab_size: int = 2048) -> ModelConfig:
    """A quarter of a million parameters and every mechanism of the big ones: for tests."""
    vision = VisionConfig(depth=4, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, fullatt_block_indexes=(1, 3))
    text = TextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        mrope_section=(2, 3, 3),
    )
    return ModelConfig(vision, text, "tiny")


def tiny_qwen2_vl(vocab_size: int = 2048) -> ModelConfig:
    """The same of Qwen2-VL, for tests."""
    vision = VisionConfig(
        depth=3,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        out_hidden_size=64,
        window_size=None,
        tokens_per_second=0,
        norm="layer",
        mlp="quick_gelu",
    )
    return ModelConfig(vision, tiny(vocab_size).text, "tiny-qwen2-vl")


def tiny_qwen3_vl(vocab_size: int = 2048) -> ModelConfig:
    """The same of Qwen3-VL, for tests; its heads together are wider than the decoder, as in the 4B model."""
    vision = _vision_of_qwen3(3, 32, 64, 64, (0, 2), heads=2, position_grid=5)
    text = TextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        mrope_section=(6, 3, 3),
        mrope_interleaved=True,
        rope_theta=5e6,
        qkv_bias=False,
        qk_norm=True,
    )
    return ModelConfig(vision, text, "tiny-qwen3-vl")


def match() -> ModelConfig:
    """6.0 million parameters: it comments on simulated matches."""
    vision = VisionConfig(depth=6, hidden_size=192, intermediate_size=416, num_heads=6, out_hidden_size=192, fullatt_block_indexes=(1, 3, 5))
    text = TextConfig(
        vocab_size=768,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        mrope_section=(4, 6, 6),
    )
    return ModelConfig(vision, text, "match")


MODELS = {
    "tiny": tiny,
    "match": match,
    "3b": qwen2_5_vl_3b,
    "7b": qwen2_5_vl_7b,
    "32b": qwen2_5_vl_32b,
    "72b": qwen2_5_vl_72b,
    "qwen2-vl-2b": qwen2_vl_2b,
    "qwen2-vl-7b": qwen2_vl_7b,
    "qwen3-vl-4b": qwen3_vl_4b,
    "qwen3-vl-8b": qwen3_vl_8b,
}
