"""Tokenizers: a byte-level BPE trained on the corpus and cached, or one loaded from a ``tokenizer.json``.

Documents are tokenized whole and as plain text: truncation, padding and BPE dropout stored in the file are switched
off, and text that happens to spell a special token is encoded letter by letter.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from vocabpp_jax.data.cache import cache_folder, written_atomically
from vocabpp_jax.data.corpus import Corpus
from vocabpp_jax.data.files import BOM

END_OF_TEXT = "<|endoftext|>"
"""Follows every document. It is token 0 in the tokenizers trained here."""
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "<eos>", "</s>")
"""Its name in GPT-2 and Qwen, Llama 3, Gemma, Llama 2 and Mistral."""
SMALLEST_VOCABULARY = 257
"""Every byte and the end of text."""

# GPT-2's pattern, with an upper bound on each run: BPE training time is quadratic in the longest word.
_RUN = "{1,256}"
_BOUNDED_WORDS = (
    rf"'(?:[sdmt]|ll|ve|re)| ?\p{{L}}{_RUN}| ?\p{{N}}{_RUN}| ?[^\s\p{{L}}\p{{N}}]{_RUN}|\s{_RUN}(?!\S)|\s{_RUN}"
)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most ``vocab_size`` tokens; a small corpus may not have that many pairs to merge."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size is {vocab_size}; byte-level BPE needs at least {SMALLEST_VOCABULARY}, "
            f"one for every byte and one for {END_OF_TEXT}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_BOUNDED_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer=trainer)
    # Encoding does not have that cost, so words are as long as GPT-2's.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def tokenizer_for(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """The tokenizer of the corpus' train split: from the cache, or trained and cached."""
    path = cache_folder() / f"tokenizer-{corpus.fingerprint}-{vocab_size}.json"
    if not path.exists():
        with written_atomically(path) as partial:
            partial.write_text(train_tokenizer(corpus.train(), vocab_size).to_str(pretty=False), encoding="utf-8")
    return load_tokenizer(path)


def load_tokenizer(path: str | Path, end: str | None = None) -> Tokenizer:
    """Load a ``tokenizer.json`` and set it up for whole documents.

    Raises:
        ValueError: no such file, not a tokenizer, or no end-of-text token: ``end`` if given, else what
            :func:`end_token` finds.
    """
    if not Path(path).is_file():
        raise ValueError(f"tokenizer is {str(path)!r}, which is not a file; give a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_str(Path(path).read_bytes().removeprefix(BOM).decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None
    except Exception:  # the library raises bare Exception
        raise ValueError(f"{path} cannot be read as a tokenizer; give a tokenizer.json, or delete it") from None
    try:
        end_token(tokenizer, end)
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None
    tokenizer.encode_special_tokens = True
    return tokenizer


def stored_end(path: str | Path) -> str | None:
    """The ``eos_token`` in the ``tokenizer_config.json`` next to a ``tokenizer.json``; None if there is none.

    Raises:
        ValueError: the file exists but cannot be read.
    """
    config = Path(path).with_name("tokenizer_config.json")
    if not config.is_file():
        return None
    try:
        token = json.loads(config.read_bytes().removeprefix(BOM)).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
    except (OSError, ValueError, RecursionError, AttributeError):
        raise ValueError(f"{config} is not a JSON object; fix it, or move it away") from None
    if not isinstance(token, str | None):
        raise ValueError(f"{config} has eos_token {token!r}; it must be a string")
    return token


def end_token(tokenizer: Tokenizer, name: str | None = None) -> int:
    """The token that follows every document: ``name`` if given, else the first of :data:`ENDS_OF_TEXT` it has.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    names = ENDS_OF_TEXT if name is None else (name,)
    for token in map(tokenizer.token_to_id, names):
        if token is not None:
            return token
    if name is not None:
        raise ValueError(f"end_of_text is {name!r}, which is not a token of the tokenizer; name one that it has")
    raise ValueError(
        f"there is no end-of-text token, {', '.join(ENDS_OF_TEXT[:-1])} or {ENDS_OF_TEXT[-1]}; name it with "
        "end_of_text, or as eos_token in the tokenizer_config.json next to it"
    )


def special_tokens(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """A pattern matching the special tokens, longest first; None if there are none."""
    added = tokenizer.get_added_tokens_decoder().values()
    names = sorted({token.content for token in added if token.special and token.content.strip()}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None


def fingerprint(tokenizer: Tokenizer, end: int | None = None) -> str:
    """A hash of everything that determines the tokens of a text, including the token ``end`` after each document."""
    digest = hashlib.blake2b(tokenizer.to_str().encode(), digest_size=16)
    usual = [token for token in map(tokenizer.token_to_id, ENDS_OF_TEXT) if token is not None]
    if end is not None and end != (usual or [None])[0]:
        digest.update(b"end %d" % end)
    return digest.hexdigest()
