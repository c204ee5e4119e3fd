"""Training a sentencepiece tokenizer on a sample of the corpus.

BPE with byte fallback and nothing normalised, so that decoding gives back every text exactly, spaces, tabs and line
ends included. The sample is bounded, spread evenly over the corpus and free of held-out documents; the same corpus
gives the same file, byte for byte.
"""

import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from configs.errors import ConfigError, DataError, problem
from engine.data.examples import Fields, sample_text
from engine.data.records import read_records
from engine.data.sources import Corpus
from engine.data.tokenizer_backends import MAX_VOCAB

SAMPLE_BYTES_PER_TOKEN = 2048
"""Text that a token of the vocabulary is learned from: 8 MiB for 4,096 tokens, a second of training."""
MIN_VOCAB = 260
_PIECE_CHARS = 4000
_NUM_SPECIAL = 3


def train_tokenizer(sample: Iterator[str], vocab_size: int, path: Path) -> None:
    """Write a sentencepiece BPE model of `vocab_size` tokens: <unk> 0, <s> 1, </s> 2, 256 bytes, pieces.

    Raises DataError when the sample has too little text, or too many characters, for so many tokens.
    """
    import sentencepiece  # here: preparing with a given tokenizer needs no trainer

    check_vocab(vocab_size)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
            sentence_iterator=_pieces(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=1 << 20,
            num_threads=1,  # the number is written into the file, and another one gives another file
            minloglevel=3,
        )
    except RuntimeError as error:
        raise DataError(_explain(str(error), vocab_size)) from None
    with open(path, "xb") as file:
        file.write(model.getvalue())
        file.flush()
        os.fsync(file.fileno())


def check_vocab(vocab_size: int) -> None:
    """Raise ConfigError for a vocabulary that can't even hold the bytes."""
    if vocab_size < MIN_VOCAB:
        why = f"{_NUM_SPECIAL} special tokens and 256 bytes come first"
        raise ConfigError(problem("--train-tokenizer", vocab_size, f"must be at least {MIN_VOCAB}", why))
    if vocab_size > MAX_VOCAB:
        raise ConfigError(problem("--train-tokenizer", vocab_size, f"must be at most {MAX_VOCAB}"))


def sample_texts(
    corpus: Corpus, fields: Fields, budget_bytes: int, max_bytes: int, wanted: Callable[[str], bool]
) -> Iterator[str]:
    """Yield documents of about `budget_bytes` in all, spread evenly over the first `max_bytes` (0: all) of the corpus.

    Documents that are not `wanted`, by their text or by what tells an example apart, are passed over. After each file
    the sample holds the same share of what was passed: of small files every so many is taken whole, of a large one its
    beginning.
    """
    total = corpus.size_bytes
    if max_bytes:
        total = min(total, max_bytes)
    share = min(1.0, budget_bytes / max(1, total))
    taken = passed = 0
    for file in corpus.files:
        goal = share * min(passed + file.size_bytes, total)
        for record in read_records(file, fields.text, fields.columns_of(file.format)):
            if taken >= goal:
                break
            text, identity = sample_text(record, fields)
            if text and wanted(identity):
                text = text[: max(_PIECE_CHARS, budget_bytes - taken)]
                taken += len(text)
                yield text
        passed += file.size_bytes
        if passed >= total:
            return


def _pieces(texts: Iterator[str]) -> Iterator[str]:
    """Cut documents into the trainer's "sentences"; it refuses tabs (its own separator) and NUL."""
    for text in texts:
        for part in re.split(r"[\t\0]+", text):
            for start in range(0, len(part), _PIECE_CHARS):
                yield part[start : start + _PIECE_CHARS]


def _explain(message: str, vocab_size: int) -> str:
    """Sentencepiece's reason in our words."""
    where = "--train-tokenizer"
    if most := re.search(r"set it to a value <= (\d+)", message):
        why = "there is too little text for more"
        return problem(where, vocab_size, f"this corpus gives {most[1]} tokens at most", why, f"Use {most[1]} or less.")
    if least := re.search(r"required_chars\. \d+ vs (\d+)", message):
        why = "each character of the text needs a token"
        return problem(where, vocab_size, f"this corpus needs at least {least[1]}", why, f"Use {least[1]} or more.")
    if "!sentences_.empty()" in message:
        return problem(where, vocab_size, "the corpus has no text to learn from")
    return problem(where, vocab_size, "sentencepiece can't train", message.split("] ")[-1].strip())
