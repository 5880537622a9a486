"""Text to token ids and back: the byte-level BPE of the Qwen family, through the `tokenizers` library alone."""

import json
from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from svlm_jax.errors import UserError
from svlm_jax.storage import Place, at, local_copy

# How Qwen2 and later cut text into pieces before merging (Qwen2 tokenization; digits come singly).
QWEN2_PIECES = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""


def byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """`model` with Qwen2's surroundings: NFC, the pieces above, bytes in and out. Adds no special tokens."""
    inner = tokenizers.Tokenizer(model)
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    return inner


class Tokenizer:
    """A model's vocabulary. Nothing is added to what it is asked to encode; it is never changed after loading."""

    def __init__(self, inner: tokenizers.Tokenizer, source: str = "this tokenizer"):
        """`source` is how messages call it, the model's directory as a rule."""
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._source = source
        self._added = {token.content: id for id, token in inner.get_added_tokens_decoder().items()}

    @classmethod
    def load(cls, model_dir: str | Place) -> "Tokenizer":
        """The tokenizer beside a model's weights: `tokenizer.json`, or else `vocab.json` + `merges.txt` (+ `tokenizer_config.json`).

        Raises UserError where there is neither, or where the files cannot be read.
        """
        folder = at(model_dir)
        try:
            if (folder / "tokenizer.json").is_file():
                return cls(tokenizers.Tokenizer.from_file(str(local_copy(folder / "tokenizer.json"))), str(folder))
            if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                return cls(_from_vocabulary(folder), str(folder))
        except UserError:
            raise
        except Exception as error:  # tokenizers raises bare Exception for any file that it cannot parse
            raise UserError(f"the tokenizer files in {folder} cannot be read ({error}): download them again") from error
        raise UserError(
            f"no tokenizer in {folder}: it needs tokenizer.json, or vocab.json and merges.txt; "
            "copy them from the directory the model was downloaded to"
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id. A model's embedding may have more rows (padding), never fewer."""
        return max(self._inner.get_vocab_size(with_added_tokens=False), max(self._added.values(), default=-1) + 1)

    def special(self, name: str) -> int:
        """The id of a special token such as `<|im_start|>`; UserError where the tokenizer has none of that name."""
        if name not in self._added:
            raise UserError(f"{self._source} has no special token {name}: use the tokenizer of a Qwen-VL model")
        return self._added[name]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, in which the names of special tokens stand for these tokens. For text that we write."""
        return self._inner.encode(_without_surrogates(text), add_special_tokens=False).ids

    def encode_plain(self, text: str) -> list[int]:
        """The ids of `text`, in which `<|im_end|>` is letters and signs like any others. For text that users write."""
        text, inner = _without_surrogates(text), self._inner
        if inner.normalizer is not None:
            text = inner.normalizer.normalize_str(text)
        pieces = [text] if inner.pre_tokenizer is None else [piece for piece, _ in inner.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for piece in pieces for token in inner.model.tokenize(piece)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`. Bytes that are not UTF-8 (a character cut in two) become U+FFFD; ids without a token become nothing."""
        return self._inner.decode([int(id) for id in ids], skip_special_tokens=skip_special)


def _without_surrogates(text: str) -> str:
    """`text` with surrogate pairs joined and lone ones (which JSON lets through, and UTF-8 cannot hold) as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _from_vocabulary(folder: Place) -> tokenizers.Tokenizer:
    """The tokenizer of `vocab.json` and `merges.txt`, with the special tokens that `tokenizer_config.json` lists by id."""
    inner = byte_level(models.BPE.from_file(str(local_copy(folder / "vocab.json")), str(local_copy(folder / "merges.txt"))))
    config = folder / "tokenizer_config.json"
    added = json.loads(config.read_text(encoding="utf-8")).get("added_tokens_decoder", {}) if config.is_file() else {}
    for id, token in sorted((int(id), token) for id, token in added.items()):
        flags = {key: bool(token.get(key, False)) for key in ("special", "normalized", "lstrip", "rstrip", "single_word")}
        add = inner.add_special_tokens if flags["special"] else inner.add_tokens
        add([AddedToken(token["content"], **flags)])
        place = inner.token_to_id(token["content"])
        if place != id:
            raise UserError(f"{config} puts {token['content']} at {id}, vocab.json at {place}: take both from the same model")
    return inner
