"""A corpus as two memory-mapped arrays of token ids: what training reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from vocabpp_jax.data.cache import cache_folder, written_atomically
from vocabpp_jax.data.corpus import STANDARD_LIBRARY, Corpus, open_corpus
from vocabpp_jax.data.tokenizer import END_OF_TEXT, fingerprint, load_tokenizer, tokenizer_for

_DOCUMENTS_AT_ONCE = 256


@dataclass(frozen=True)
class TokenizedCorpus:
    """The two splits as token ids ``[tokens]``, uint16 or uint32, every document followed by the end of text."""

    corpus: Corpus
    tokenizer: Tokenizer
    vocab_size: int
    train: np.ndarray
    validation: np.ndarray


def load_tokens(source: str = STANDARD_LIBRARY, *, vocab_size: int, tokenizer: str | None = None) -> TokenizedCorpus:
    """Tokenise ``source`` (see :func:`open_corpus`), or find it tokenised in the cache.

    The tokenizer is trained on the train split, unless ``tokenizer`` names a ``tokenizer.json``.
    Raises ValueError for what cannot be read and for token ids that are not below ``vocab_size``.
    """
    corpus = open_corpus(source)
    bpe = load_tokenizer(tokenizer) if tokenizer else tokenizer_for(corpus, vocab_size)
    folder = cache_folder()
    splits = {}
    for name, documents in (("train", corpus.train), ("validation", corpus.validation)):
        path = folder / f"tokens-{corpus.fingerprint}-{fingerprint(bpe)}-{name}.npy"
        splits[name] = _cached(path, documents(), bpe)
        check_vocabulary(splits[name], vocab_size, where=f"the {name} split of {source}")
    return TokenizedCorpus(corpus, bpe, vocab_size, **splits)


def encode(documents: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """All documents as one array ``[tokens]``, each followed by the end of text."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    end = np.array([tokenizer.token_to_id(END_OF_TEXT)], dtype)
    pieces = [np.zeros(0, dtype)]
    for some in _batched(documents):
        for encoding in tokenizer.encode_batch_fast(some, add_special_tokens=False):
            pieces += [np.array(encoding.ids, dtype), end]
    return np.concatenate(pieces)


def check_vocabulary(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    """Raise ValueError where a token id is not below ``vocab_size``."""
    largest = int(tokens.max(initial=0))
    if largest >= vocab_size:
        raise ValueError(
            f"{where} holds the token id {largest}, outside a vocabulary of {vocab_size}; "
            f"vocab_size must be at least {largest + 1}"
        )


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy of the token frequencies, in nats a token: the loss of the best model that knows no context."""
    counts = np.bincount(tokens)
    shares = counts[counts > 0] / tokens.size
    return float(-(shares * np.log(shares)).sum())


def _cached(path: Path, documents: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    if not path.exists():
        with written_atomically(path) as partial:
            np.save(partial, encode(documents, tokenizer))
    try:
        return np.load(path, mmap_mode="r")
    except ValueError:
        raise ValueError(f"{path} is damaged; delete it, and it is made again") from None


def _batched(documents: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(documents)
    while some := list(itertools.islice(iterator, _DOCUMENTS_AT_ONCE)):
        yield some
