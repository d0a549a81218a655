"""One stage of a timed pipeline: a process with one device that serves ``speed.py`` and ``compare_pytorch.py``.

All ranks get the same requests in the same order, so they always run the same program together.
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
"""The script that a :class:`~speed_measure.processes.Group` runs."""


@dataclass
class Ready:
    """A compiled contender with its arguments."""

    contender: Contender
    step: Any
    params: Params
    batch: dict[str, jax.Array]


@dataclass
class Stage:
    """A rank's request handlers; every method is a request."""

    ready: dict[str, Ready] = field(default_factory=dict)
    params: dict[Any, Params] = field(default_factory=dict)
    pass_times: PassTimes = field(default_factory=PassTimes)

    def join(self, coordinator: str, ranks: int) -> dict[str, Any]:
        """Find the other ranks; returns a description of the devices."""
        began = time.monotonic()
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        rank = int(os.environ["RANK"])
        ClusterOptions(coordinator=coordinator, processes=ranks, process_id=rank).join(ranks)
        found = self.describe() | {"seconds": time.monotonic() - began}
        multihost_utils.sync_global_devices("joined")
        return found | ({"calmed": processes.deprioritize_network_threads()} if jax.default_backend() == "cpu" else {})

    def simulate(self, devices: int) -> dict[str, Any]:
        """Run alone, simulating devices if there are only CPUs."""
        ClusterOptions().join(devices)
        return self.describe()

    def describe(self) -> dict[str, Any]:
        """The devices, and the version of jax."""
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
        # the same flags for all, so that they differ only in what they compute
        flags = compiler_options(contender.mesh)
        lowered = jax.jit(contender.value_and_grad, compiler_options=flags).lower(params, batch)
        traced = time.monotonic()
        compiled = lowered.compile()
        done = time.monotonic()
        self.ready[name] = Ready(contender, compiled, params, batch)
        return {"data_s": at - began, "trace_s": traced - at, "compile_s": done - traced}

    def _data(self, contender: Contender, shape: tuple[int, ...], vocab_size: int) -> tuple[Params, dict]:
        """Random parameters and tokens, created where they are used; contenders with the same layout share them."""
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
        """One step, started by all ranks together: seconds on the slowest rank, and processor seconds of this one."""
        ready = self.ready[name]
        began = time.process_time()
        took = slowest(lambda: ready.step(ready.params, ready.batch))
        return took, time.process_time() - began

    def prepare_passes(self, name: str) -> None:
        """Compile a pipeline's passes, each as a separate program."""
        ready = self.ready[name]
        self.pass_times.prepare(ready.contender.pipe, ready.params, ready.batch)

    def time_passes(self) -> None:
        """A round of all passes, each started by all ranks together."""
        self.pass_times.round(slowest)

    def forget_passes(self) -> None:
        """Forget everything: passes of another model or microbatch size have the same names."""
        self.pass_times = PassTimes()

    def predict(self, name: str) -> dict[str, Any]:
        """The measured times of a pipeline's passes, and the simulated step time from them, in ms."""
        return self.pass_times.predict(self.ready[name].contender.pipe)

    def account(self, name: str) -> dict[str, float]:
        """Where a step's time goes when all devices share a core: ms per step, by kind of pass."""
        return self.pass_times.account(self.ready[name].contender.pipe)

    def losses(self, folder: str, model: dict, pipeline: dict, lr: float, steps: int) -> list[float]:
        """Train on a folder's weights and batches; returns the loss of every step."""
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
    """A contender's description for a rank: the options for one copy of the model, with ``case`` applied."""
    timed = dataclasses.replace(pipeline.on(platform), data_parallel=1, **case)
    return {"model": dataclasses.asdict(model), "pipeline": dataclasses.asdict(timed)}


def build(model: dict, pipeline: dict, comparator: str | None = None) -> tuple[Contender, models.Config]:
    """A contender from a :func:`request` and, for a comparator, its name."""
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
    """Seconds of the slowest rank for something that all start together."""
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
