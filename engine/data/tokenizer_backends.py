"""The two libraries behind a tokenizer: sentencepiece for .model files, tokenizers for a Hugging Face tokenizer.json.

Both do the same for the class of tokenizer.py, which is what everything else uses: text to ids and back without any
token of their own, special tokens only where they are asked for, and the bytes that each token stands for.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from configs.errors import DataError, problem

EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<\uff5cend\u2581of\u2581sentence\uff5c>")
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<\uff5cbegin\u2581of\u2581sentence\uff5c>")
_SPACE = "\u2581"  # how sentencepiece writes a space
MAX_VOCAB = 1 << 24
"""Tables are made of as many entries as there are tokens; sentencepiece itself reads no number of over 31 bits."""
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")

TokenizerKind = Literal["sentencepiece", "huggingface"]
Places = list[tuple[int, int]]
"""First character of each token and the one behind its last; they overlap where a character has several tokens."""


class _Backend(Protocol):
    """What Tokenizer needs of a library."""

    kind: TokenizerKind
    vocab_size: int
    default_eos: int | None
    default_bos: int | None

    def encode(self, text: str) -> list[int]: ...

    def encode_special(self, text: str) -> tuple[list[int], Places | None]: ...

    def decode(self, ids: list[int]) -> str: ...

    def id_of(self, token: str) -> int | None: ...

    def name_of(self, token: int) -> str: ...

    def token_bytes(self) -> list[int]: ...

    def special_ids(self) -> set[int]: ...


def load_backend(path: Path) -> _Backend:
    """Load a tokenizer file; raises DataError for what is none."""
    if path.suffix == ".json":
        return _HuggingFace(path)
    return _SentencePiece(path)


class _SentencePiece:
    """A sentencepiece model."""

    kind: TokenizerKind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        import sentencepiece  # here: who has a tokenizer.json needs none of it

        sentencepiece.set_min_log_level(3)  # it would print its own error beside ours
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            do = "Where a tokenizer.json lies beside it (Llama 3's .model is of another kind), give that."
            raise DataError(problem(str(path), "", "is not a sentencepiece model", do=do)) from None
        self.vocab_size: int = self._model.vocab_size()
        self.default_eos = _given(self._model.eos_id())
        self.default_bos = _given(self._model.bos_id())
        # Three bytes of the space symbol, for texts that hold the symbol itself.
        symbol = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        faithful = all(self._model.is_byte(i) for i in symbol) and self._round_trips("  a\n\n b\t ")
        self._symbol = symbol if faithful else None

    def encode(self, text: str) -> list[int]:
        """Return ids; where the model keeps every space, the symbol for spaces survives as bytes."""
        if self._symbol is None or _SPACE not in text:
            return self._model.encode(text)
        ids: list[int] = []
        for part in text.split(_SPACE):
            ids += self._model.encode(part) + self._symbol
        return ids[: -len(self._symbol)]

    def encode_special(self, text: str) -> tuple[list[int], Places | None]:
        """Return ids and places; the control tokens stand between pieces that are encoded each by itself."""
        controls = [self.name_of(token) for token in sorted(self.special_ids())]
        ids: list[int] = []
        places: Places | None = []
        at = 0
        for part in re.split(f"({'|'.join(map(re.escape, controls))})" if controls else "(?!)", text):
            found = [self._model.piece_to_id(part)] if part in controls else self.encode(part)
            spans = [(0, len(part))] if part in controls else self._spans(part, found)
            places = None if places is None or spans is None else places + [(at + a, at + b) for a, b in spans]
            ids += found
            at += len(part)
        return ids, places

    def decode(self, ids: list[int]) -> str:
        """Return the text."""
        return self._model.decode(ids)

    def id_of(self, token: str) -> int | None:
        """Return the id of a piece."""
        found = self._model.piece_to_id(token)
        return found if self._model.id_to_piece(found) == token else None

    def name_of(self, token: int) -> str:
        """Return the piece."""
        return self._model.id_to_piece(token)

    def token_bytes(self) -> list[int]:
        """Return bytes a piece; an unknown character counts as nothing, for nothing is known of it."""
        model, sizes = self._model, []
        for token in range(self.vocab_size):
            if model.is_byte(token):
                sizes.append(1)
            elif model.is_control(token) or model.is_unknown(token) or model.is_unused(token):
                sizes.append(0)
            else:
                sizes.append(len(model.id_to_piece(token).replace(_SPACE, " ").encode()))
        return sizes

    def special_ids(self) -> set[int]:
        """Return the control tokens."""
        return {token for token in range(self.vocab_size) if self._model.is_control(token)}

    @cached_property
    def _sizes(self) -> npt.NDArray[np.int64]:
        return np.array(self.token_bytes(), dtype=np.int64)

    def _spans(self, text: str, ids: list[int]) -> Places | None:
        """Characters of each token, by the bytes that tokens stand for; None where these are not the text's."""
        data = np.frombuffer(text.encode(), dtype=np.uint8)
        ends = np.cumsum(self._sizes[ids])
        added = int(ends[-1]) - len(data) if ids else 0
        if added not in (0, 1):
            return None
        # Bytes of one character share its number; a space that was put before the text belongs to the first one.
        of_byte = np.cumsum((data & 0xC0) != 0x80) - 1
        begins = np.concatenate([[0], ends[:-1]])
        first = np.clip(begins - added, 0, None)
        last = np.clip(ends - added - 1, 0, None)
        return list(zip(of_byte[first].tolist(), (of_byte[last] + 1).tolist(), strict=True)) if len(data) else []

    def _round_trips(self, text: str) -> bool:
        return self._model.decode(self._model.encode(text)) == text


class _HuggingFace:
    """A tokenizer.json, by the tokenizers library (no transformers)."""

    kind: TokenizerKind = "huggingface"

    def __init__(self, path: Path) -> None:
        import tokenizers  # here: who has a sentencepiece model needs none of it

        try:
            text = path.read_bytes().decode()
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing more precise
            do = "Give a tokenizer.json of the tokenizers library, or a sentencepiece .model."
            raise DataError(problem(str(path), "", "is not a tokenizer", str(error), do)) from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # What tokens it would add is never asked for; left in place it would take spaces out of the places of tokens.
        self._tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
        self._parts = json.loads(text)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocab_size > MAX_VOCAB:
            what = f"names token {self.vocab_size - 1}, and no tokenizer has more than {MAX_VOCAB}"
            raise DataError(problem(str(path), "", what, do="Fetch it again."))
        self.default_eos = self._first(EOS_NAMES)
        self.default_bos = self._first(BOS_NAMES)

    def encode(self, text: str) -> list[int]:
        """Return ids without what the post-processor would add."""
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_special(self, text: str) -> tuple[list[int], Places | None]:
        """Return ids and places."""
        self._tokenizer.encode_special_tokens = False
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        self._tokenizer.encode_special_tokens = True
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int]) -> str:
        """Return the text, special tokens left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        """Return the id of a token."""
        return self._tokenizer.token_to_id(token)

    def name_of(self, token: int) -> str:
        """Return the token's name."""
        return self._tokenizer.id_to_token(token) or ""

    def token_bytes(self) -> list[int]:
        """Return bytes a token: of its own alphabet for byte-level BPE, else of its text."""
        byte_level = any('"ByteLevel"' in json.dumps(self._parts.get(part)) for part in ("pre_tokenizer", "decoder"))
        sizes = [0] * self.vocab_size
        for token, number in self._tokenizer.get_vocab(with_added_tokens=False).items():
            # In the byte-level alphabet one character stands for one byte.
            plain = len(token) if byte_level else len(token.replace(_SPACE, " ").encode())
            sizes[number] = 1 if _BYTE.fullmatch(token) and not byte_level else plain
        for number, added in self._tokenizer.get_added_tokens_decoder().items():
            sizes[number] = 0 if added.special else len(added.content.encode())
        unknown = self._parts["model"].get("unk_token")
        if isinstance(unknown, str) and (number := self.id_of(unknown)) is not None:
            sizes[number] = 0
        return sizes

    def special_ids(self) -> set[int]:
        """Return the added tokens that are called special."""
        return {number for number, added in self._tokenizer.get_added_tokens_decoder().items() if added.special}

    def _first(self, names: Sequence[str]) -> int | None:
        found = (self.id_of(name) for name in names)
        return next((number for number in found if number is not None), None)


def _given(token: int) -> int | None:
    return token if token >= 0 else None
