"""The Hugging Face folder that a run exports; everything except the weights is read before training begins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from training_run.train_options import TrainOptions
from vocabpp_jax import Pipeline
from vocabpp_jax.data import TokenizedCorpus
from vocabpp_jax.models import Config, huggingface
from vocabpp_jax.runtime import hosts
from vocabpp_jax.runtime.faults import Stop, reason


@dataclass(frozen=True)
class Export:
    """Where the weights go, and the files that accompany them."""

    folder: str
    config: Config
    source: huggingface.Source | None
    """What is kept of the folder that the run started from."""
    tokenizer: Mapping[str, bytes] | None
    """The files of the tokenizer that the options name."""

    def write(self, params: Any, pipe: Pipeline, tokens: TokenizedCorpus) -> None:
        """Write the folder. Raises Stop if it cannot be written."""
        values = {} if self.source or tokens.end is None else {"eos_token_id": tokens.end}
        tokenizer = self.tokenizer or (_trained(tokens, self.config) if tokens.tokenizer else None)
        kept = {"source": self.source, "tokenizer": tokenizer, "values": values}
        try:
            huggingface.save(self.folder, self.config, params, pipe, **kept)
        except (OSError, ValueError) as problem:
            raise Stop(f"the weights cannot be exported to {self.folder}: {reason(problem)}") from None


def plan_export(options: TrainOptions, config: Config, pipe: Pipeline) -> Export | None:
    """The export that the options ask for. Raises ValueError if it could not be written."""
    if not options.export:
        return None
    source = huggingface.read_source(options.model.folder) if options.pretrained else None
    hosts.agree(lambda: jax.process_index() or huggingface.check_save(options.export, config, pipe, source=source))
    named = options.data.tokenizer
    return Export(options.export, config, source, huggingface.tokenizer_files(named) if named else None)


def _trained(tokens: TokenizedCorpus, config: Config) -> dict[str, bytes]:
    """The files of a tokenizer that was trained on the data."""
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokens.tokenizer.id_to_token(tokens.end),
        "model_max_length": config.seq,
    }
    files = {"tokenizer.json": tokens.tokenizer.to_str(pretty=True), "tokenizer_config.json": json.dumps(about)}
    return {name: text.encode() for name, text in files.items()}
