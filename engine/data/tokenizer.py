"""Text to token ids and back: sentencepiece .model files and Hugging Face tokenizer.json, behind one class.

Encoding adds no token of its own and never reads a special token out of the text: "</s>" in a document is four
characters, not the end of it. The end-of-text token is explicit: `eos_token`, else tokenizer_config.json beside the
file, else what the file says or a well-known name. Training a tokenizer lives in tokenizer_training.py.
"""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from configs.errors import DataError, problem
from engine.files import hash_file

EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<\uff5cend\u2581of\u2581sentence\uff5c>")
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<\uff5cbegin\u2581of\u2581sentence\uff5c>")
CONFIG = "tokenizer_config.json"
_BESIDE = ("special_tokens_map.json", "chat_template.jinja")
_SPACE = "\u2581"  # how sentencepiece writes a space
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_INCOMPLETE = "\ufffd"  # what a decoder puts where a character's bytes are not all there

TokenizerKind = Literal["sentencepiece", "huggingface"]


class _Backend(Protocol):
    """What Tokenizer needs of a library."""

    kind: TokenizerKind
    vocab_size: int
    default_eos: int | None
    default_bos: int | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def id_of(self, token: str) -> int | None: ...

    def name_of(self, token: int) -> str: ...

    def token_bytes(self) -> list[int]: ...


class Tokenizer:
    """A tokenizer file and the tokens that mark the ends of a text."""

    def __init__(self, path: Path, eos_token: str = "") -> None:
        """Load a .model, a .json, or the folder that holds one; raises DataError for what is no tokenizer.

        `eos_token` names the end-of-text token; without it, it is looked up as this module says.
        """
        self.path = _find(Path(path))
        self._backend = _load(self.path)
        self.kind: TokenizerKind = self._backend.kind
        self.vocab_size = self._backend.vocab_size
        self.sha256 = hash_file(self.path)
        self._settings = _read_settings(self.path.with_name(CONFIG))
        self.eos_id = self._end_of_text(eos_token)
        self.eos_token = self._backend.name_of(self.eos_id)
        bos = _token_name(self._settings.get("bos_token"))
        self.bos_id = self._backend.id_of(bos) if bos else self._backend.default_bos

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without begin or end tokens."""
        return self._backend.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special tokens have none."""
        return self._backend.decode(list(ids))

    def id_of(self, token: str) -> int | None:
        """Return the id of a token by its name, None when there is no such token."""
        return self._backend.id_of(token)

    def token_bytes(self) -> npt.NDArray[np.uint16]:
        """Return the UTF-8 bytes that each token (vocab) stands for; special tokens stand for none.

        Tokens of a text add up to its bytes, plus `prefix_bytes`, where the tokenizer loses nothing.
        """
        table = np.minimum(self._backend.token_bytes(), np.iinfo(np.uint16).max).astype(np.uint16)
        table[self.eos_id] = 0  # also where its file doesn't call it special
        if self.bos_id is not None:
            table[self.bos_id] = 0
        return table

    def prefix_bytes(self) -> int:
        """Return the bytes of the space that the tokenizer itself puts before a text (0 or 1)."""
        table = self.token_bytes()
        return max(0, int(table[self.encode("a")].sum()) - 1)

    def copy_to(self, folder: Path) -> None:
        """Copy the tokenizer into a new folder, as one that loads again with the same end-of-text token."""
        folder.mkdir()
        name = "tokenizer.json" if self.kind == "huggingface" else "tokenizer.model"
        (folder / name).write_bytes(self.path.read_bytes())
        for beside in _BESIDE:
            source = self.path.with_name(beside)
            if source.is_file():
                (folder / beside).write_bytes(source.read_bytes())
        settings = dict(self._settings)
        settings["eos_token"] = self.eos_token
        (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")

    def stream(self) -> "TextStream":
        """Start turning ids into text one at a time."""
        return TextStream(self)

    def _end_of_text(self, eos_token: str) -> int:
        named = eos_token or _token_name(self._settings.get("eos_token"))
        if named:
            found = self._backend.id_of(named)
            if found is None:
                where = "--eos-token" if eos_token else f"{self.path.with_name(CONFIG)}: eos_token"
                known = [name for name in EOS_NAMES if self._backend.id_of(name) is not None]
                close = difflib.get_close_matches(named, known, n=1, cutoff=0.3)
                do = f"Did you mean {close[0]!r}?" if close else "Name one with --eos-token."
                raise DataError(problem(where, named, f"is no token of {self.path.name}", do=do))
            return found
        if self._backend.default_eos is None:
            why = "documents are joined by it"
            do = "Name one of its tokens with --eos-token."
            raise DataError(problem(str(self.path), "", "has no end-of-text token", why, do))
        return self._backend.default_eos


class TextStream:
    """Text of a growing list of ids, given out as soon as its characters are whole.

    A character may span tokens, and a token's text may depend on the one before it (leading spaces): so the newest
    tokens are decoded together with the last ones given out, and only what is new is returned.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Start before the first token."""
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Return the text that `token` completes; empty while a character is not whole."""
        self._pending.append(token)
        text = self._new_text()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """Return what is left, whole or not."""
        text, self._pending = self._new_text(), []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]


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
        self._parts = json.loads(text)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.default_eos = self._first(EOS_NAMES)
        self.default_bos = self._first(BOS_NAMES)

    def encode(self, text: str) -> list[int]:
        """Return ids without what the post-processor would add."""
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

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

    def _first(self, names: Sequence[str]) -> int | None:
        found = (self.id_of(name) for name in names)
        return next((number for number in found if number is not None), None)


def _load(path: Path) -> _Backend:
    if path.suffix == ".json":
        return _HuggingFace(path)
    return _SentencePiece(path)


def _find(path: Path) -> Path:
    """The tokenizer file that `path` names or holds."""
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return path / name
        models = sorted(path.glob("*.model"))
        if len(models) == 1:
            return models[0]
        raise DataError(problem(str(path), "", "holds neither tokenizer.json nor tokenizer.model"))
    if not path.is_file():
        raise DataError(problem(str(path), "", "no such tokenizer"))
    if path.suffix not in (".model", ".json"):
        raise DataError(problem(str(path), "", "a tokenizer is a sentencepiece .model or a tokenizer.json"))
    return path


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(problem(str(path), "", "is not JSON", str(error))) from None
    return settings if isinstance(settings, dict) else {}


def _token_name(value: Any) -> str:
    """A token's name as tokenizer_config.json writes it: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _given(token: int) -> int | None:
    return token if token >= 0 else None
