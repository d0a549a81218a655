"""A corpus as two memory-mapped arrays of token ids, which training reads."""

from __future__ import annotations

import itertools
import json
from collections import Counter
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
from vocabpp_jax.data.remembered import remembered
from vocabpp_jax.data.tokenizer import (
    end_token,
    fingerprint,
    load_tokenizer,
    special_tokens,
    stored_end,
    tokenizer_for,
)

_DOCUMENTS_AT_ONCE = 256
_AT_ONCE = 2**24  # tokens


@dataclass(frozen=True)
class TokenizedCorpus:
    """The two splits as token ids ``[tokens]``, and where they come from."""

    name: str
    fingerprint: str
    """A hash of the documents."""
    tokenizer: Tokenizer | None
    """The tokenizer that produced the tokens; None if the source was already tokenized."""
    documents: int
    damaged: tuple[str, ...]
    """A sentence for each thing left out because it is damaged."""
    train: np.ndarray
    validation: np.ndarray
    find_ends: Callable[[], tuple[np.ndarray, np.ndarray]]
    end: int | None = None
    """The token that follows every document; None if the source was already tokenized."""
    notes: tuple[str, ...] = ()
    """A sentence for each choice in how the source is read and split that may surprise the user."""
    files: tuple[Path, ...] = ()
    """The files that the tokens are mapped from."""

    @cached_property
    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """The document ends in each split: ascending, each the index of the first token after a document."""
        return self.find_ends()

    @cached_property
    def entropy(self) -> float:
        """:func:`unigram_entropy` of the validation split."""
        about = {"unigram entropy": self.identity, "tokens": [len(self.train), len(self.validation)]}
        return remembered(about, self.files, lambda: {"nats": unigram_entropy(self.validation)})["nats"]

    @property
    def identity(self) -> dict[str, str | None]:
        """What distinguishes these tokens from any others."""
        mark = fingerprint(self.tokenizer, self.end) if self.tokenizer else None
        return {"data": self.fingerprint, "tokenizer": mark}


def load_tokens(
    source: str = STANDARD_LIBRARY,
    *,
    vocab_size: int,
    tokenizer: str | None = None,
    end_of_text: str | None = None,
    damaged: Literal["refuse", "skip"] = "refuse",
) -> TokenizedCorpus:
    """Tokenize ``source`` (see :func:`open_corpus`) or load its tokens from the cache.

    Every document is followed by an end-of-text token; a Megatron dataset is used as it is.

    Args:
        tokenizer: a ``tokenizer.json``; without it, one is trained on the train split.
        end_of_text: the token that follows every document. Without it, the ``eos_token`` of the
            ``tokenizer_config.json`` next to the tokenizer, else the first of :data:`ENDS_OF_TEXT` that it has.

    Raises:
        ValueError: unreadable input, contradictory options, or token ids not below ``vocab_size``.
    """
    if is_megatron(source):
        for name, value in (("tokenizer", tokenizer), ("end_of_text", end_of_text)):
            if value:
                raise ValueError(f"data is {source!r}, which holds tokens already; {name} does not go with it")
        return _megatron(source, vocab_size, damaged)
    if end_of_text and not tokenizer:
        raise ValueError(f"end_of_text is {end_of_text!r} without a tokenizer; give the tokenizer.json that has it")
    end_name = (end_of_text or stored_end(tokenizer)) if tokenizer else None
    bpe = load_tokenizer(tokenizer, end_name) if tokenizer else None
    corpus = open_corpus(source, damaged)
    bpe = bpe or tokenizer_for(corpus, vocab_size)
    end = end_token(bpe, end_name)
    prefix = cache_folder() / f"tokens-{corpus.fingerprint}-{fingerprint(bpe, end)}"
    splits, found = {}, Counter()
    files = tuple(Path(f"{prefix}-{name}.npy") for name in ("train", "validation"))
    for name, path, documents in zip(("train", "validation"), files, (corpus.train, corpus.validation), strict=True):
        splits[name], more = _cached(path, documents(), bpe, end)
        found.update(more)
        check_vocabulary(splits[name], vocab_size, where=f"the {name} split of {source}", file=path)
    if found["empty"] >= corpus.documents:
        raise ValueError(f"the tokenizer makes no tokens of the text in {source}; give the tokenizer that fits it")
    return TokenizedCorpus(
        name=source,
        fingerprint=corpus.fingerprint,
        tokenizer=bpe,
        documents=corpus.documents,
        damaged=corpus.damaged,
        **splits,
        find_ends=lambda: tuple(_cached_ends(p, x, end) for p, x in zip(files, splits.values(), strict=True)),
        end=end,
        notes=(*corpus.notes, *_surprises(found, corpus.documents), *_far_from_asked(*splits.values())),
        files=files,
    )


def _surprises(found: Counter[str], documents: int) -> Iterator[str]:
    """Sentences about text that did not become the tokens one may expect."""
    if special := sorted(name.removeprefix(_SPECIAL) for name in found if name.startswith(_SPECIAL)):
        some = ", ".join(special[:3]) + (", ..." if len(special) > 3 else "")
        yield f"{found['special']:,} of {documents:,} documents spell special tokens ({some}), which are read as text"
    if found["unknown"]:
        yield f"{found['unknown']:,} tokens are the tokenizer's unknown token: it has none for some of the text"
    if found["empty"]:
        yield f"{found['empty']:,} of {documents:,} documents become no tokens at all"


def _far_from_asked(train: np.ndarray, validation: np.ndarray) -> Iterator[str]:
    share = len(validation) / max(1, len(train) + len(validation))
    if not HELD_OUT / 2 <= share <= 2 * HELD_OUT:
        yield (
            f"validation has {share:.1%} of the tokens rather than {HELD_OUT:.0%}: the documents are few, short or "
            "copies of each other"
        )


def _megatron(source: str, vocab_size: int, damaged: Literal["refuse", "skip"]) -> TokenizedCorpus:
    """Hold out the last documents; where that is far from :data:`HELD_OUT` of the tokens, cut a document."""
    dataset = read_indexed(source, damaged)
    check_vocabulary(dataset.tokens, vocab_size, where=source, file=dataset.file)
    total, fingerprint = len(dataset.tokens), dataset.fingerprint
    cut = int(total * (1 - HELD_OUT))
    if len(dataset.ends) > 1:
        between = dataset.ends[:-1]  # always hold out at least the last document
        whole = int(between[min(np.searchsorted(between, cut), len(between) - 1)])
        if not HELD_OUT / 2 <= (total - whole) / total <= 2 * HELD_OUT:
            whole = int(between[np.argmin(np.abs(between - cut))])
            if not HELD_OUT / 2 <= (total - whole) / total <= 2 * HELD_OUT:
                whole = cut
            fingerprint += f"-{whole}"
        cut = whole
    train, validation = dataset.tokens[:cut], dataset.tokens[cut:]
    ends = dataset.ends[dataset.ends < cut], dataset.ends[dataset.ends > cut] - cut
    return TokenizedCorpus(
        name=source,
        fingerprint=fingerprint,
        tokenizer=None,
        documents=len(dataset.ends),
        damaged=dataset.damaged,
        train=train,
        validation=validation,
        find_ends=lambda: (np.append(ends[0], cut), ends[1]),
        notes=tuple(_far_from_asked(train, validation)),
        files=(dataset.file,),
    )


def encode(documents: Iterable[str], tokenizer: Tokenizer, end: int | None = None) -> np.ndarray:
    """All documents as one array ``[tokens]``, each followed by the token ``end``, or the end-of-text token if None.

    Raises:
        ValueError: the tokenizer cannot encode a document, or encodes part of one as ``end``.
    """
    return _encoded(documents, tokenizer, end_token(tokenizer) if end is None else end)[0]


_SPECIAL = "special:"


def _encoded(documents: Iterable[str], tokenizer: Tokenizer, end: int) -> tuple[np.ndarray, Counter[str]]:
    """Also counts what :func:`_surprises` reports."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    dtype = np.uint16 if largest < 2**16 else np.uint32
    special, pieces, found = special_tokens(tokenizer), [np.zeros(0, dtype)], Counter()
    for some in _batched(documents):
        try:
            encodings = tokenizer.encode_batch_fast(some, add_special_tokens=False)
        except Exception as problem:  # the library raises bare Exception
            raise ValueError(f"the tokenizer cannot encode the text: {' '.join(str(problem).split())}") from None
        for text, encoding in zip(some, encodings, strict=True):
            ids = np.array(encoding.ids, dtype)
            if (ids == end).any():
                raise ValueError(
                    f"the tokenizer makes {tokenizer.id_to_token(end)!r}, which ends documents, out of text within "
                    "one; name another token with end_of_text"
                )
            pieces += [ids, np.array([end], dtype)]
            found["empty"] += not len(ids)
            if special and (names := set(special.findall(text))):
                found.update(["special", *(_SPECIAL + name for name in names)])
    tokens = np.concatenate(pieces)
    unknown = getattr(tokenizer.model, "unk_token", None)
    if unknown and (unknown_id := tokenizer.token_to_id(unknown)) is not None:
        found["unknown"] = int(np.count_nonzero(tokens == unknown_id))
    return tokens, +found


def check_vocabulary(tokens: np.ndarray, vocab_size: int, where: str, file: Path | None = None) -> None:
    """Raise ValueError if a token id is not below ``vocab_size``.

    The extremes found in ``file``, which the tokens are mapped from, are cached so that it is not read again.
    """

    def extremes() -> dict[str, int]:
        pieces = [tokens[i : i + _AT_ONCE] for i in range(0, len(tokens), _AT_ONCE)]
        largest = max((int(piece.max()) for piece in pieces), default=0)
        return {"largest": largest, "least": min((int(piece.min()) for piece in pieces), default=0)}

    about = {"extremes": [len(tokens), str(tokens.dtype)]}
    found = extremes() if file is None else remembered(about, [file], extremes)
    largest, least = found["largest"], found["least"]
    if least < 0:
        raise ValueError(f"{where} holds the token id {least}; token ids are not negative")
    if largest >= vocab_size:
        raise ValueError(
            f"{where} holds the token id {largest}, outside a vocabulary of {vocab_size}; "
            f"vocab_size must be at least {largest + 1}"
        )


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy of the token frequencies, in nats a token: the loss of the best model that knows no context."""
    counts = np.zeros(0, np.int64)
    for i in range(0, len(tokens), _AT_ONCE):
        more = np.bincount(tokens[i : i + _AT_ONCE], minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    shares = counts[counts > 0] / tokens.size
    return float(-(shares * np.log(shares)).sum())


def _cached(path: Path, documents: Iterable[str], tokenizer: Tokenizer, end: int) -> tuple[np.ndarray, dict[str, int]]:
    """The tokens and what was found in them, from the cache or put there; the tokens last, as they vouch for both."""
    about = path.with_suffix(".json")
    if not path.exists() or not about.exists():
        tokens, found = _encoded(documents, tokenizer, end)
        with written_atomically(about) as partial:
            partial.write_text(json.dumps(found))
        _write(path, tokens)
    try:
        return np.load(path, mmap_mode="r"), {str(k): int(v) for k, v in json.loads(about.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged; delete it, and it is computed again") from None


def _cached_ends(path: Path, tokens: np.ndarray, end: int) -> np.ndarray:
    """Where the documents end in the tokens of a file, from the cache or put there."""
    ends = path.with_suffix(".ends.npy")
    if not ends.exists():
        pieces = [np.flatnonzero(tokens[i : i + _AT_ONCE] == end) + i + 1 for i in range(0, len(tokens), _AT_ONCE)]
        _write(ends, np.concatenate([np.zeros(0, np.int64), *pieces]))
    try:
        return np.load(ends, mmap_mode="r")
    except (OSError, ValueError):
        raise ValueError(f"{ends} is damaged; delete it, and it is computed again") from None


def _write(path: Path, array: np.ndarray) -> None:
    with written_atomically(path) as partial, partial.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)  # unlike numpy's own writing, fails with the system's reason


def _batched(documents: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(documents)
    while some := list(itertools.islice(iterator, _DOCUMENTS_AT_ONCE)):
        yield some
