"""One rank of the same GPT on PyTorch's pipelines, with the weights and batches that ``compare_pytorch.py`` wrote.

    python experiments/compare_pytorch.py --folder runs/exchange ...
    torchrun --nproc-per-node 8 experiments/pytorch_baseline.py --folder runs/exchange --schedules 1f1b v-zb ...

``compare_pytorch.py`` starts the ranks of a single machine itself, and sends them the same requests as
``speed_stage.py``. When started by hand with torchrun, the model and pipeline options must be those given to
``compare_pytorch.py``.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from command_line.options import ModelOptions, PipelineOptions
from command_line.parsing import fail, or_fail, parse
from comparators import EVEN_SHARE
from pytorch.pytorch_gpt import Shape, Stage, pipeline, token_loss
from speed_measure import exchange, processes


@dataclass
class Rank:
    """A rank's request handlers; every method is a request."""

    gpus: bool = field(default_factory=torch.cuda.is_available)
    steps: dict[str, Callable[[], Any]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return torch.device("cuda", torch.cuda.current_device()) if self.gpus else torch.device("cpu")

    def join(self, coordinator: str | None = None, ranks: int = 1) -> dict[str, Any]:
        """Find the other ranks; returns a description of the devices."""
        if self.gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        else:
            torch.set_num_threads(1)
        where = {} if coordinator is None else {"init_method": f"tcp://{coordinator}"}
        rank, ranks = int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", ranks))
        dist.init_process_group("nccl" if self.gpus else "gloo", rank=rank, world_size=ranks, **where)
        name = torch.cuda.get_device_name(self.device) if self.gpus else "cpu"
        dist.barrier()
        calmed = {} if self.gpus else {"calmed": processes.deprioritize_network_threads()}
        return {"device": name, "devices": ranks, "torch": torch.__version__} | calmed

    def prepare(
        self, name: str, schedule: str, shape: dict, folder: str, microbatches: int, stages: int = 1
    ) -> dict[str, float]:
        """Load the weights and the first batch for one schedule, or for ``even-share``: every rank alone with its share
        of the microbatches and the last of ``stages``, which is the whole model if there is only one.

        Raises:
            ValueError: PyTorch has no such schedule, or it cannot hold this model.
        """
        began = time.monotonic()
        weights = exchange.read_weights(Path(folder))
        batch = next(exchange.read_batches(Path(folder)))
        if schedule == EVEN_SHARE:
            self.steps[name] = self._alone(Stage(Shape(**shape), weights, stages - 1, stages), batch, microbatches)
        else:
            run, modules = self._pipeline(schedule, Shape(**shape), weights, microbatches)

            def step() -> None:
                for module in modules:
                    module.zero_grad(set_to_none=True)
                run(batch)

            self.steps[name] = step
        return {"data_s": time.monotonic() - began}

    def _pipeline(self, schedule: str, shape: Shape, weights: dict, m: int) -> tuple[Callable, list[Stage]]:
        """``batch -> loss`` on the last stage's rank, None elsewhere; and this rank's modules."""
        rank, p = dist.get_rank(), dist.get_world_size()
        runner, modules = pipeline(schedule, shape, weights, m, rank, p, self.device)
        first, last = modules[0].tokens is not None, modules[-1].head is not None

        def run(batch: dict) -> float | None:
            tokens, labels = (self._flat(batch[k]) for k in ("tokens", "labels"))
            losses: list[torch.Tensor] = []
            runner.step(
                *((tokens,) if first else ()),
                target=labels if last else None,
                losses=losses if last else None,
                return_outputs=False,
            )
            return float(torch.stack(losses).mean()) if last else None

        return run, modules

    def _alone(self, module: Stage, batch: dict, m: int) -> Callable[[], None]:
        """A plain gradient-accumulation step on this rank's share. A stage without an embedding gets random inputs."""
        module, p, rank = module.to(self.device), dist.get_world_size(), dist.get_rank()
        entering, labels = (torch.from_numpy(batch[k][rank::p]).long().to(self.device) for k in ("tokens", "labels"))
        if module.tokens is None:
            shape = (*labels.shape[1:], module.head.in_features)
            entering = [torch.randn(shape, device=self.device, requires_grad=True) for _ in labels]

        def step() -> None:
            module.zero_grad(set_to_none=True)
            for x, of in zip(entering, labels, strict=True):
                (token_loss(module(x), of) / m).backward()

        return step

    def _flat(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(array).flatten(0, 1).long().to(self.device)

    def time(self, name: str) -> tuple[float, float]:
        """One step, started by all ranks together: seconds on the slowest rank, and processor seconds of this one."""
        dist.barrier()
        began, busy = time.perf_counter(), time.process_time()
        self.steps[name]()
        if self.gpus:
            torch.cuda.synchronize()
        took = torch.tensor([time.perf_counter() - began], device=self.device)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        return float(took), time.process_time() - busy

    def losses(self, schedule: str, shape: dict, folder: str, microbatches: int, lr: float, steps: int) -> list[float]:
        """Train on a folder's weights and batches; returns the loss of every step."""
        run, modules = self._pipeline(schedule, Shape(**shape), exchange.read_weights(Path(folder)), microbatches)
        adam = exchange.ADAM
        optimizer = torch.optim.AdamW(
            [w for module in modules for w in module.parameters()],
            lr=lr,
            betas=(adam["b1"], adam["b2"]),
            eps=adam["eps"],
            weight_decay=0.0,
        )
        found = []
        for batch in itertools.islice(exchange.read_batches(Path(folder)), steps):
            optimizer.zero_grad(set_to_none=True)
            loss = run(batch)
            optimizer.step()
            everyone = torch.tensor([0.0 if loss is None else loss], dtype=torch.float64, device=self.device)
            dist.all_reduce(everyone)
            found.append(float(everyone))
        return found


def handlers() -> dict[str, Any]:
    """The requests that this rank answers."""
    rank = Rank()
    return {name: getattr(rank, name) for name in ("join", "prepare", "time", "losses")}


@dataclass(frozen=True)
class BaselineOptions:
    """What torchrun's ranks do."""

    folder: str
    """Folder where compare_pytorch.py wrote weights and batches."""
    what: Literal["losses", "speed"] = "speed"
    """Train and print every step's loss, or time steps."""
    schedules: tuple[str, ...] = ("1f1b",)
    """PyTorch's schedules: 1f1b, gpipe, interleaved-1f1b, v-zb, or even-share for every rank alone."""
    repeats: int = 3
    """With speed: steps to time."""
    steps: int = 50
    """With losses: optimizer steps."""
    lr: float = 1e-3
    """With losses: the learning rate."""
    model: ModelOptions = field(default_factory=ModelOptions)
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)


def main(arguments: Sequence[str] | None = None) -> None:
    options = or_fail(lambda: parse(BaselineOptions, __doc__, arguments))
    if "RANK" not in os.environ:
        fail("RANK is not set; start this with torchrun, or run compare_pytorch.py")
    or_fail(options.model.refuse_other_losses)
    config, m = or_fail(options.model.config), options.pipeline.microbatches
    rank = Rank()
    print(json.dumps(rank.join()), file=sys.stderr)
    shape = {name: getattr(config, name) for name in ("layers", "hidden", "heads", "vocab_size")}
    for schedule in options.schedules:
        given = {"schedule": schedule, "shape": shape, "folder": options.folder, "microbatches": m}
        if options.what == "losses":
            told: Any = or_fail(lambda g=given: rank.losses(**g, lr=options.lr, steps=options.steps))
        else:
            or_fail(lambda g=given: rank.prepare(name=g["schedule"], **g))
            rank.time(schedule)
            told = [rank.time(schedule)[0] for _ in range(options.repeats)]
        if dist.get_rank() == 0:
            unit = "losses" if options.what == "losses" else "seconds"
            print(json.dumps({"schedule": schedule, unit: told}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main() if len(sys.argv) > 1 else processes.serve(handlers())
