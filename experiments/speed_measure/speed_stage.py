"""One stage of a pipeline that is timed: a process with one device, asked by ``speed.py`` and ``compare_pytorch.py``.

All ranks get the same requests in the same order, so that what they run together is the same program.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from command_line.options import ClusterOptions, ModelOptions, PipelineOptions
from comparators import COMPARATORS, Contender, Ours
from speed_measure import exchange, processes
from speed_measure.speed_passes import PassTimes
from vocabpp_jax import Pipeline, models, train
from vocabpp_jax.pipeline.flags import compiler_options
from vocabpp_jax.pipeline.model_interface import Params

STAGE_SCRIPT = Path(__file__)
"""What a :class:`~speed_measure.processes.Group` runs."""


@dataclass
class Ready:
    """A compiled contender with what it takes."""

    contender: Contender
    step: Any
    params: Params
    batch: dict[str, jax.Array]


@dataclass
class Stage:
    """What a rank can be asked; every method is a request."""

    ready: dict[str, Ready] = field(default_factory=dict)
    params: dict[Any, Params] = field(default_factory=dict)
    pass_times: PassTimes = field(default_factory=PassTimes)

    def join(self, coordinator: str, ranks: int) -> dict[str, Any]:
        """Find the other ranks; returns what the devices are."""
        began = time.monotonic()
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        rank = int(os.environ["RANK"])
        ClusterOptions(coordinator=coordinator, processes=ranks, process_id=rank).join(ranks)
        found = self.describe() | {"seconds": time.monotonic() - began}
        multihost_utils.sync_global_devices("joined")
        return found | ({"calmed": processes.deprioritize_network_threads()} if jax.default_backend() == "cpu" else {})

    def simulate(self, devices: int) -> dict[str, Any]:
        """Be alone, and simulate devices where there are only CPUs."""
        ClusterOptions().join(devices)
        return self.describe()

    def describe(self) -> dict[str, Any]:
        """The devices, and the version of what runs on them."""
        return {
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "platform": jax.default_backend(),
            "jax": jax.__version__,
        }

    def prepare(self, name: str, model: dict, pipeline: dict, comparator: str | None = None) -> dict[str, float]:
        """Build a contender and compile its step; returns the seconds that each took.

        Raises:
            ValueError: there is no such contender.
        """
        began = time.monotonic()
        contender, config = build(model, pipeline, comparator)
        options = PipelineOptions(**pipeline)
        shape = (options.microbatches, options.microbatch_size, config.seq)
        params, batch = self._data(contender, shape, config.vocab_size)
        at = time.monotonic()
        flags = compiler_options(contender.mesh)  # the same for all, so that they differ by what they compute alone
        lowered = jax.jit(contender.value_and_grad, compiler_options=flags).lower(params, batch)
        traced = time.monotonic()
        compiled = lowered.compile()
        done = time.monotonic()
        self.ready[name] = Ready(contender, compiled, params, batch)
        return {"data_s": at - began, "trace_s": traced - at, "compile_s": done - traced}

    def _data(self, contender: Contender, shape: tuple[int, ...], vocab_size: int) -> tuple[Params, dict]:
        """Random parameters and tokens, made where they are used; layouts that are the same share them."""
        mesh = contender.mesh
        specs = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec), contender.specs(), is_leaf=lambda s: isinstance(s, PartitionSpec)
        )
        model = contender.pipe.model if isinstance(contender, Ours) else contender.model
        layout = contender.pipe.layout if isinstance(contender, Ours) else None
        where = layout and (layout.layer_of, layout.sharded, layout.schedule.placement)
        key = (where, str(jax.tree.flatten(specs)), str(jax.eval_shape(contender.pack, model.param_shapes())))
        if key not in self.params:
            whole = jax.jit(lambda k: contender.pack(model.init(k)), out_shardings=specs)
            draw = contender.pipe.init if isinstance(contender, Ours) else whole
            self.params[key] = draw(jax.random.key(0))

        def tokens(k: jax.Array) -> dict[str, jax.Array]:
            first, second = jax.random.split(k)
            draw = lambda k: jax.random.randint(k, shape, 0, vocab_size, jnp.int32)  # noqa: E731
            return {"tokens": draw(first), "labels": draw(second)}

        batch = jax.jit(tokens, out_shardings=NamedSharding(mesh, contender.batch_spec))(jax.random.key(1))
        return self.params[key], batch

    def time(self, name: str) -> tuple[float, float]:
        """One step, all ranks beginning together: seconds on the slowest, and seconds of this rank's processor."""
        ready = self.ready[name]
        began = time.process_time()
        took = slowest(lambda: ready.step(ready.params, ready.batch))
        return took, time.process_time() - began

    def prepare_passes(self, name: str) -> None:
        """Compile a pipeline's passes, each as a program of its own."""
        ready = self.ready[name]
        self.pass_times.prepare(ready.contender.pipe, ready.params, ready.batch)

    def time_passes(self) -> None:
        """A round of all passes, all ranks beginning each together."""
        self.pass_times.round(slowest)

    def forget_passes(self) -> None:
        """Begin anew: passes of another model, or of other microbatches, go by the same names."""
        self.pass_times = PassTimes()

    def predict(self, name: str) -> dict[str, Any]:
        """The measured times of a pipeline's passes, and the step that the simulator makes of them, in ms."""
        return self.pass_times.predict(self.ready[name].contender.pipe)

    def account(self, name: str) -> dict[str, float]:
        """Where the time of a step goes when all devices share a core: ms a step, by the kind of pass."""
        return self.pass_times.account(self.ready[name].contender.pipe)

    def losses(self, folder: str, model: dict, pipeline: dict, lr: float, steps: int) -> list[float]:
        """Train from the weights and on the batches in a folder; the loss of every step."""
        contender, config = build(model, pipeline)
        pipe = contender.pipe
        optimizer = optax.adamw(lr, **exchange.ADAM, weight_decay=0.0)
        weights = exchange.read_weights(Path(folder))
        canonical = jax.tree_util.tree_map_with_path(lambda path, _: weights[name_of(path)], pipe.model.param_shapes())
        state = train.start_from(pipe, optimizer, pipe.shard(canonical))
        step = train.make_step(pipe, optimizer, clip=None)
        sharding, found = NamedSharding(pipe.mesh, contender.batch_spec), []
        for batch in itertools.islice(exchange.read_batches(Path(folder)), steps):
            state, metrics = step(state, jax.device_put(batch, sharding))
            found.append(float(metrics["loss"]))
        return found


def request(model: ModelOptions, pipeline: PipelineOptions, platform: str, **case: Any) -> dict[str, dict]:
    """What names a contender to a rank: the options, of the pipeline with what ``case`` says, one copy of the model."""
    timed = dataclasses.replace(pipeline.on(platform), data_parallel=1, **case)
    return {"model": dataclasses.asdict(model), "pipeline": dataclasses.asdict(timed)}


def build(model: dict, pipeline: dict, comparator: str | None = None) -> tuple[Contender, models.Config]:
    """A contender from a :func:`request` and the comparator's name, if it is one."""
    asked, options = ModelOptions(**model), PipelineOptions(**pipeline)
    config, mesh = asked.config(), options.mesh()
    if comparator is None:
        schedule = options.build(config, mtp_depth=asked.mtp_depth)
        return Ours(Pipeline(asked.build(config), schedule, mesh, compute_dtype=config.dtype)), config
    if comparator not in COMPARATORS:
        raise ValueError(f"comparators has {comparator!r}; they are {', '.join(COMPARATORS)}")
    return COMPARATORS[comparator](models.build(config), mesh, options.microbatches, config.dtype), config


def name_of(path: tuple) -> str:
    """A parameter's name in a file: its path in the canonical tree."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def slowest(run: Any) -> float:
    """Seconds that the slowest rank needs for something that all begin together."""
    multihost_utils.sync_global_devices("begin")
    began = time.perf_counter()
    jax.block_until_ready(run())
    mine = time.perf_counter() - began
    return float(np.max(multihost_utils.process_allgather(np.float32(mine))))


def handlers() -> dict[str, Any]:
    """The requests that this rank answers."""
    stage = Stage()
    alone = ("join", "simulate", "describe", "losses")
    steps = ("prepare", "time")
    passes = ("prepare_passes", "time_passes", "forget_passes", "predict", "account")
    return {name: getattr(stage, name) for name in (*alone, *steps, *passes)}


if __name__ == "__main__":
    processes.serve(handlers())
