"""A corpus as two memory-mapped arrays of token ids: what training reads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from vocabpp_jax.data.cache import cache_folder, written_atomically
from vocabpp_jax.data.corpus import HELD_OUT, STANDARD_LIBRARY, open_corpus
from vocabpp_jax.data.megatron import is_megatron, read_indexed
from vocabpp_jax.data.tokenizer import end_of_text, fingerprint, load_tokenizer, tokenizer_for

_DOCUMENTS_AT_ONCE = 256
_AT_ONCE = 2**24  # tokens


@dataclass(frozen=True)
class TokenizedCorpus:
    """The two splits as token ids ``[tokens]``, and where they come from."""

    name: str
    fingerprint: str
    """A hash of the documents."""
    tokenizer: Tokenizer | None
    """What made the tokens; None where they came as tokens."""
    documents: int
    damaged: tuple[str, ...]
    """A sentence for each thing that was left out."""
    train: np.ndarray
    validation: np.ndarray
    ends_of: Callable[[np.ndarray], np.ndarray]

    @cached_property
    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Where in each split its documents end: ascending, each the index of the first token after one."""
        return self.ends_of(self.train), self.ends_of(self.validation)

    @property
    def identity(self) -> dict[str, str | None]:
        """What tells these tokens from any others."""
        return {"data": self.fingerprint, "tokenizer": fingerprint(self.tokenizer) if self.tokenizer else None}


def load_tokens(
    source: str = STANDARD_LIBRARY,
    *,
    vocab_size: int,
    tokenizer: str | None = None,
    damaged: Literal["refuse", "skip"] = "refuse",
) -> TokenizedCorpus:
    """Tokenise ``source`` (see :func:`open_corpus`), or find it tokenised in the cache; a Megatron dataset holds tokens
    already. In the tokens every document is followed by the end of text.

    The tokenizer is trained on the train split, unless ``tokenizer`` names a ``tokenizer.json``.
    Raises ValueError for what cannot be read and for token ids that are not below ``vocab_size``.
    """
    if is_megatron(source):
        if tokenizer:
            raise ValueError(f"data is {source!r}, which holds tokens already; tokenizer does not go with it")
        return _megatron(source, vocab_size, damaged)
    corpus = open_corpus(source, damaged)
    bpe = load_tokenizer(tokenizer) if tokenizer else tokenizer_for(corpus, vocab_size)
    folder, mark = cache_folder(), fingerprint(bpe)
    splits = {}
    for name, documents in (("train", corpus.train), ("validation", corpus.validation)):
        path = folder / f"tokens-{corpus.fingerprint}-{mark}-{name}.npy"
        splits[name] = _cached(path, documents(), bpe)
        check_vocabulary(splits[name], vocab_size, where=f"the {name} split of {source}")
    end = end_of_text(bpe)
    return TokenizedCorpus(
        name=source,
        fingerprint=corpus.fingerprint,
        tokenizer=bpe,
        documents=corpus.documents,
        damaged=corpus.damaged,
        **splits,
        ends_of=lambda tokens: np.flatnonzero(tokens == end) + 1,
    )


def _megatron(source: str, vocab_size: int, damaged: Literal["refuse", "skip"]) -> TokenizedCorpus:
    """The last documents, some :data:`HELD_OUT` of the tokens, are held out; of a single document, its end."""
    dataset = read_indexed(source, damaged)
    check_vocabulary(dataset.tokens, vocab_size, where=source)
    total = len(dataset.tokens)
    cut = int(total * (1 - HELD_OUT))
    if len(dataset.ends) > 1:
        last = len(dataset.ends) - 2  # the last document at least is held out
        cut = int(dataset.ends[min(np.searchsorted(dataset.ends, cut), last)])
    train, validation = dataset.tokens[:cut], dataset.tokens[cut:]
    ends = {len(train): dataset.ends[dataset.ends <= cut], len(validation): dataset.ends[dataset.ends > cut] - cut}
    return TokenizedCorpus(
        name=source,
        fingerprint=dataset.fingerprint,
        tokenizer=None,
        documents=len(dataset.ends),
        damaged=dataset.damaged,
        train=train,
        validation=validation,
        ends_of=lambda tokens: ends[len(tokens)],
    )


def encode(documents: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """All documents as one array ``[tokens]``, each followed by the end of text."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    end = np.array([end_of_text(tokenizer)], dtype)
    pieces = [np.zeros(0, dtype)]
    for some in _batched(documents):
        for encoding in tokenizer.encode_batch_fast(some, add_special_tokens=False):
            pieces += [np.array(encoding.ids, dtype), end]
    return np.concatenate(pieces)


def check_vocabulary(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    """Raise ValueError where a token id is not below ``vocab_size``."""
    pieces = [tokens[i : i + _AT_ONCE] for i in range(0, len(tokens), _AT_ONCE)]
    largest = max((int(piece.max()) for piece in pieces), default=0)
    least = min((int(piece.min()) for piece in pieces), default=0)
    if least < 0:
        raise ValueError(f"{where} holds the token id {least}; token ids are not negative")
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
