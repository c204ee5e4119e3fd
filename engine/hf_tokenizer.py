"""The tokenizer files of an exported folder, so that transformers' AutoTokenizer gives the ids that training saw.

A tokenizer.json is passed on as it is. A sentencepiece model is passed on and also rewritten as a tokenizer.json,
because transformers 5 builds its Llama tokenizer from the vocabulary alone and forgets how the model treats spaces and
what it normalises. The rewritten one must give the same ids on probe texts, or the export is refused.

Source of the rewriting: transformers' convert_slow_tokenizer.py, SpmConverter.
"""

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from configs.errors import DataError, problem
from engine.data.tokenizer import Tokenizer

SPACE = "\u2581"  # how sentencepiece writes a space
PASSED_ON = ("special_tokens_map.json", "chat_template.jinja")
# Of a sentencepiece model's settings: the others steer the tokenizer class that is not used.
KEPT_SETTINGS = ("bos_token", "unk_token", "pad_token", "add_bos_token", "add_eos_token", "model_max_length")

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # SentencePiece.Type

_PROBES = (
    "Hello world",
    "  two  leading spaces,\ttabs\n\n\nand\r\nnew lines  \n",
    "def f(x, *, y=None):\n    return {'a': [1, 22, 333, -4.5e-6], **x}  # 100%\n",
    "na\u00efve \u00dcber \u4f60\u597d \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \ufb01 \u00bd \uff21",
    "\U0001f642\u200d\U0001f680 e\u0301",
    "a" * 70 + "=" * 81 + " " * 33 + "\u2581x",
    " ",
    "\n",
)


def rewritten(model: bytes, where: str) -> tokenizers.Tokenizer:
    """Rewrite a sentencepiece model as a Tokenizer of the tokenizers library; it adds no tokens of its own.

    Raises DataError where that can't be done with the same ids on all probe texts.
    """
    proto: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    proto.ParseFromString(model)
    tokenizer = tokenizers.Tokenizer(_model(proto, where))
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    tokenizer.decoder = _decoder(proto.normalizer_spec.add_dummy_prefix)
    tokenizer.add_special_tokens(_added(proto, special=True))
    tokenizer.add_tokens(_added(proto, special=False))
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in _PROBES:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if ids != original.encode(text):
            raise DataError(
                problem(
                    where,
                    "",
                    f"can't be rewritten as tokenizer.json: other ids for {text[:40]!r}",
                    do="Export without it: --tokenizer none.",
                )
            )
    return tokenizer


def _model(proto: Any, where: str) -> Any:
    pieces = [piece.piece for piece in proto.pieces]
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN)
    byte_fallback = proto.trainer_spec.byte_fallback
    if proto.trainer_spec.model_type == _UNIGRAM:
        return models.Unigram([(p.piece, p.score) for p in proto.pieces], unknown, byte_fallback)
    if proto.trainer_spec.model_type == _BPE:
        return models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            _merges(proto),
            unk_token=pieces[unknown],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    do = "Export without it: --tokenizer none."
    raise DataError(problem(where, "", "must be a BPE or unigram model to be rewritten as tokenizer.json", do=do))


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every pair that makes up a piece, best piece first: sentencepiece joins by the score of the result alone."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    ranked = sorted(scores, key=lambda piece: -scores[piece])  # stable: equal scores stay in the order of their ids
    return [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def _normalizer(spec: Any) -> Any:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(dummy_prefix: bool) -> Any:
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)


def _added(proto: Any, special: bool) -> list[AddedToken]:
    types = (_CONTROL, _UNKNOWN) if special else (_USER_DEFINED,)
    return [AddedToken(p.piece, normalized=False, special=special) for p in proto.pieces if p.type in types]


def tokenizer_files(source: Path) -> dict[str, bytes]:
    """Give the files, by name, that make AutoTokenizer read text as `source` does: a tokenizer.json or a .model.

    Raises DataError where they can't be made.
    """
    tokenizer = Tokenizer(source)
    files = {name: source.with_name(name) for name in PASSED_ON}
    contents = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if source.suffix == ".json":
        contents["tokenizer.json"] = source.read_bytes()
        settings |= _settings(source)
    else:
        model = source.read_bytes()
        original = sentencepiece.SentencePieceProcessor(model_proto=model)
        contents["tokenizer.model"] = model
        contents["tokenizer.json"] = rewritten(model, str(source)).to_str(pretty=False).encode()
        named = {"unk_token": original.unk_id(), "bos_token": original.bos_id()}
        settings |= {name: original.id_to_piece(i) for name, i in named.items() if i >= 0}
        settings |= {name: value for name, value in _settings(source).items() if name in KEPT_SETTINGS}
    settings["eos_token"] = tokenizer.eos_token
    contents["tokenizer_config.json"] = (json.dumps(settings, indent=2) + "\n").encode()
    return contents


def special_ids(source: Path) -> tuple[int | None, int]:
    """Give the ids that begin and end a text."""
    tokenizer = Tokenizer(source)
    return tokenizer.bos_id, tokenizer.eos_id


def leading_ids(source: Path) -> list[int]:
    """Give what transformers puts before a text: what the settings beside the file say, else what the file does.

    A bare sentencepiece model means Llama's tokenizer, which begins a text with <s>.
    """
    begins = _settings(source).get("add_bos_token")
    if begins is None and source.suffix == ".json":
        encoding = tokenizers.Tokenizer.from_file(str(source)).encode("a")
        pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return [token for token, _ in takewhile(lambda pair: pair[1], pairs)]
    bos_id, _ = special_ids(source)
    return [] if bos_id is None or begins is False else [bos_id]


def _settings(source: Path) -> dict[str, Any]:
    path = source.with_name("tokenizer_config.json")
    return json.loads(path.read_bytes()) if path.is_file() else {}
