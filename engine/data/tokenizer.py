"""Text to token ids and back: sentencepiece .model files and Hugging Face tokenizer.json, behind one class.

Encoding adds no token of its own and never reads a special token out of the text: "</s>" in a document is four
characters, not the end of it. Only `encode_special` does, for what a chat template wrote. The end-of-text token is
explicit: `eos_token`, else tokenizer_config.json beside the file, else what the file says or a well-known name.
Training a tokenizer lives in tokenizer_training.py.
"""

import difflib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.errors import DataError, problem
from engine.data.tokenizer_backends import EOS_NAMES, Places, TokenizerKind, load_backend
from engine.files import hash_file

CONFIG = "tokenizer_config.json"
GIVE = "Give a sentencepiece .model or a tokenizer.json, or a folder with one."
_BESIDE = ("special_tokens_map.json", "chat_template.jinja")
_INCOMPLETE = "\ufffd"  # what a decoder puts where a character's bytes are not all there
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class Tokenizer:
    """A tokenizer file and the tokens that mark the ends of a text."""

    def __init__(self, path: Path, eos_token: str = "") -> None:
        """Load a .model, a .json, or the folder that holds one; raises DataError for what is no tokenizer.

        `eos_token` names the end-of-text token; without it, it is looked up as this module says.
        """
        self.path = _find(Path(path))
        self._backend = load_backend(self.path)
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

    def encode_more(self, text: str) -> list[int]:
        """Return the ids of a text that goes on from another: without the space that some put before a text."""
        begin = self._backend.encode("\n") if self._prefix_bytes else []
        whole = self._backend.encode("\n" + text) if begin else []
        return whole[len(begin) :] if begin and whole[: len(begin)] == begin else self._backend.encode(text)

    def encode_special(self, text: str) -> tuple[list[int], Places | None]:
        """Return the ids of a text in which the names of special tokens are those tokens, and where each stands.

        The places are None where the tokenizer changes the text, so that nobody can say which characters a token is of.
        """
        return self._backend.encode_special(text)

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
        return self._prefix_bytes

    @cached_property
    def _prefix_bytes(self) -> int:
        table = self.token_bytes()
        return max(0, int(table[self.encode("a")].sum()) - 1)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that no plain text holds."""
        return frozenset(self._backend.special_ids())

    def name_of(self, token: int) -> str:
        """Return the name of a token."""
        return self._backend.name_of(token)

    def named_tokens(self) -> dict[str, str]:
        """Return the names that chat templates see: `bos_token`, `eos_token` and what else the settings say."""
        found = {key: name for key in _NAMED if (name := _token_name(self._settings.get(key)))}
        if self.kind == "sentencepiece" and self.bos_id is not None:
            found.setdefault("bos_token", self._backend.name_of(self.bos_id))
        return found | {"eos_token": self.eos_token}

    def setting(self, key: str) -> Any:
        """Return what the tokenizer_config.json beside the file says; None where it is silent."""
        return self._settings.get(key)

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


def _find(path: Path) -> Path:
    """The tokenizer file that `path` names or holds."""
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return path / name
        models = sorted(path.glob("*.model"))
        if len(models) == 1:
            return models[0]
        raise DataError(problem(str(path), "", "holds neither tokenizer.json nor tokenizer.model", do=GIVE))
    if not path.is_file():
        raise DataError(problem(str(path), "", "no such tokenizer", do=GIVE))
    if path.suffix not in (".model", ".json"):
        raise DataError(problem(str(path), "", "is no tokenizer", do=GIVE))
    return path


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(problem(str(path), "", "is not JSON", str(error), "Fetch it again.")) from None
    if not isinstance(settings, dict):
        raise DataError(problem(str(path), "", f"must be a JSON object, not a {type(settings).__name__}"))
    return settings


def _token_name(value: Any) -> str:
    """A token's name as tokenizer_config.json writes it: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
