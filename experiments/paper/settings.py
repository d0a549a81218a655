"""The published rows, and the options that set up the same runs here."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from command_line.options import ModelOptions, PipelineOptions

PUBLISHED = Path(__file__).parents[2] / "docs" / "paper"
TABLES = {5: PUBLISHED / "table5_1f1b.csv", 6: PUBLISHED / "table6_v_half.csv"}
MODELS = {(5, 8): "4B", (5, 16): "10B", (5, 32): "21B", (6, 16): "7B", (6, 24): "16B", (6, 32): "30B"}
SCHEDULES = {5: "1f1b", 6: "v-half"}
MICROBATCHES = 128


@dataclass(frozen=True)
class Setting:
    """One row of Table 5 or 6, published or of our own: what ran, its MFU in percent and peak memory in GiB."""

    table: int
    gpus: int
    seq: int
    method: str
    vocab_size: int
    mfu: float | None = None
    memory: float | None = None
    schedule: str = ""
    tied: bool = False

    @property
    def name(self) -> str:
        """Its key among the results."""
        tied = " tied" if self.tied else ""
        return f"{self.order} {self.method} {self.gpus} GPUs s={self.seq} V={self.vocab_size}{tied}"

    @property
    def order(self) -> str:
        """The pipeline schedule: the row's own if it has one, else the table's."""
        return self.schedule or SCHEDULES[self.table]

    @property
    def model(self) -> ModelOptions:
        """The model options."""
        return ModelOptions(
            model=MODELS[self.table, self.gpus],
            seq=self.seq,
            vocab_size=self.vocab_size,
            tie_embeddings=self.tied,
            dtype="bfloat16",
        )

    @property
    def pipeline(self) -> PipelineOptions:
        """The pipeline options."""
        return PipelineOptions(
            schedule=self.order,
            method=self.method,
            stages=self.gpus,
            microbatches=MICROBATCHES,
            microbatch_size=1,
            data_parallel=1,
        )


def published(table: int) -> list[Setting]:
    """The rows of Table 5 or 6; those that ran out of memory have neither MFU nor memory."""
    with TABLES[table].open() as file:
        return [
            Setting(
                table,
                int(row["gpus"]),
                int(row["seq_length"]),
                row["method"],
                int(row["vocab_size"]),
                float(row["mfu_percent"]) if row["mfu_percent"] else None,
                float(row["peak_memory_gb"]) if row["peak_memory_gb"] else None,
            )
            for row in csv.DictReader(file)
        ]
