"""The engine against the emulated original, where nothing was recorded: settings, sizes and texts drawn at random."""

import random
from typing import Any

import oracle
import original
import pytest
import replay_trace

MARGIN = 2e-3  # between the best and the second-best token; float32 decides nothing below it
CANDIDATES = [151645, 2503, 198, 279, 264, 374, 304, 323, 311, 315, 389, 448, 369, 566, 433, 1431, 2219, 4227, 1414, 1279, 5000]
RATES = [(2, 1), (1, 1), (8, 1), (3, 1), (1, 2), (0.5, 4), (3, 2), (5, 1), (7, 0.5), (29.97, 0.2)]  # frames a second, seconds a round
SIZES = [(28, 28), (28, 84), (84, 28), (56, 140), (112, 112)]
TEXTS = ["", "A match between two teams.", "a b c d e f g h i j k l m", "Ünïcode 日本語 e\u0301 😀", " two\n\nlines\n"]
QUERIES = ["Commentate on this match", "", " Что там? 😀\n"]
DECODERS = [(4, 2, 16, [2, 3, 3]), (2, 1, 16, [4, 2, 2]), (3, 3, 16, [0, 4, 4]), (2, 2, 32, [8, 4, 4])]  # heads, kv heads, head size, sections


def random_trace(seed: int) -> dict[str, Any]:
    """A trace without its rounds."""
    r = random.Random(seed)
    fps, chunk = r.choice(RATES)
    shorter, difference, longer = r.randint(1, 3), r.randint(1, 3), seed % 3
    windows = {"window_size": max(shorter, 2 * (longer != 1)) + difference * (longer == 2), "text_round": max(2, shorter) + difference * (longer == 1)}
    sink, sliding = r.choice([(None, None), (0, 1), (0, 4), (3, 1), (1, 2), (8, 12)])
    height, width = r.choice(SIZES)
    mode = r.choice(["shrink", "append", "recompute"])
    case = {
        **{"fps": fps, "chunk_duration": chunk, "duration": r.randint(9, 14) * chunk, "height": height, "width": width, "seed": seed},
        **{**windows, "text_sink": sink, "text_sliding_window": sliding, "max_new_tokens": r.choice([1, 2, 3, 6, 12])},
        **{"previous_text": r.choice(TEXTS), "query": r.choice(QUERIES), "repetition_penalty": r.choice([1.0, 1.05, 1.5, 0.8])},
        **{"pos_mode": "append" if mode == "append" else "shrink", "recompute": mode == "recompute"},
        **{"skip_first_chunk": r.choice([0, 7, 99_995])},
    }
    heads, kv_heads, head_dim, sections = r.choice(DECODERS)
    depth = r.choice([1, 2])
    vision = {
        **{"depth": depth, "hidden_size": 32, "num_heads": 2, "intermediate_size": 40, "out_hidden_size": heads * head_dim},
        **{"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "hidden_act": "silu"},
        **{"window_size": r.choice([28, 56, 100, 112]), "fullatt_block_indexes": [0] * r.randint(0, 1), "tokens_per_second": r.choice([1, 2, 25])},
    }
    config = {
        **{"vocab_size": 151_680, "hidden_size": heads * head_dim, "num_attention_heads": heads, "num_key_value_heads": kv_heads},
        **{"intermediate_size": 64, "num_hidden_layers": r.choice([1, 2]), "rms_norm_eps": r.choice([1e-6, 1e-5]), "rope_theta": 1e6},
        **{"tie_word_embeddings": False, "rope_scaling": {"type": "default", "mrope_section": sections}, "vision_config": vision},
    }
    return {"family": "qwen2_5_vl", "case": case, "config": config, "candidate_token_ids": CANDIDATES}


def test_the_emulation_agrees_with_a_recording():
    trace = oracle.read_json(oracle.DATA / "streaming" / "vision_one_longer.json.gz")
    recorded, trace["case"]["duration"] = trace.pop("rounds")[:8], 8
    produced, margin = original.emulate(trace)
    replay_trace.compare(produced, recorded)
    assert margin > MARGIN


@pytest.mark.parametrize("seed", [10, 17, 33])
def test_the_engine_does_as_the_original(seed):
    trace = random_trace(seed)
    expected, margin = original.emulate(trace)
    assert margin > MARGIN, "take another seed: float32 cannot decide these tokens"
    replay_trace.compare(replay_trace.produce(trace), expected)
