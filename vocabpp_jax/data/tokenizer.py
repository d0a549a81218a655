"""A byte-level BPE tokenizer, trained on the corpus and kept in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vocabpp_jax.data.cache import cache_folder, written_atomically
from vocabpp_jax.data.corpus import Corpus

END_OF_TEXT = "<|endoftext|>"
"""Stands after every document. Its token is 0 in the tokenizers trained here."""
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "<eos>", "</s>")
"""What tokenizers call it: GPT-2 and Qwen, Llama 3, Gemma, Llama 2 and Mistral."""
SMALLEST_VOCABULARY = 257
"""Every byte and the end of text."""


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most ``vocab_size`` tokens; little text may not have that many pairs to merge."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size is {vocab_size}; byte-level BPE needs at least {SMALLEST_VOCABULARY}, "
            f"one for every byte and one for {END_OF_TEXT}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer=trainer)
    return tokenizer


def tokenizer_for(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """The tokenizer of the corpus' train split: from the cache, or trained and put there."""
    path = cache_folder() / f"tokenizer-{corpus.fingerprint}-{vocab_size}.json"
    if not path.exists():
        with written_atomically(path) as partial:
            train_tokenizer(corpus.train(), vocab_size).save(str(partial), pretty=False)
    return load_tokenizer(path)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from a ``tokenizer.json``; it must have one of :data:`ENDS_OF_TEXT`."""
    if not Path(path).is_file():
        raise ValueError(f"tokenizer is {str(path)!r}, which is not a file; give a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # the library raises bare Exception
        raise ValueError(f"{path} cannot be read as a tokenizer; give a tokenizer.json, or delete it") from None
    if not _ends(tokenizer):
        raise ValueError(f"{path} has no token for the end of a text; give one with {' or '.join(ENDS_OF_TEXT)}")
    # Text that happens to spell a special token stays text.
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_text(tokenizer: Tokenizer) -> int:
    """The token that stands after every document."""
    return _ends(tokenizer)[0]


def _ends(tokenizer: Tokenizer) -> list[int]:
    ids = [tokenizer.token_to_id(name) for name in ENDS_OF_TEXT]
    return [token for token in ids if token is not None]


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of all that decides which tokens a text becomes."""
    return hashlib.blake2b(tokenizer.to_str().encode(), digest_size=16).hexdigest()
