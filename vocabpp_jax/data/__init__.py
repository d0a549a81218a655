"""From text to batches: corpus → tokenizer → tokens → batches, each in the module of that name."""

from vocabpp_jax.data.batches import Batch, prefetched, training_batches, validation_batches
from vocabpp_jax.data.corpus import STANDARD_LIBRARY, Corpus, open_corpus
from vocabpp_jax.data.megatron import is_megatron
from vocabpp_jax.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from vocabpp_jax.data.tokens import TokenizedCorpus, check_vocabulary, encode, load_tokens, unigram_entropy

__all__ = [
    "END_OF_TEXT",
    "STANDARD_LIBRARY",
    "Batch",
    "Corpus",
    "TokenizedCorpus",
    "check_vocabulary",
    "encode",
    "is_megatron",
    "load_tokenizer",
    "load_tokens",
    "open_corpus",
    "prefetched",
    "train_tokenizer",
    "training_batches",
    "unigram_entropy",
    "validation_batches",
]
