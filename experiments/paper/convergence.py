"""Appendix E: do the methods train alike? The same model, text and seed with each of them, and on one device.

Measured on simulated CPU devices in float32: this compares arithmetic, not speed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from paper.page import METHOD_COLORS, Files, Say, canvas
from reports.markdown import table
from vocabpp_jax import Pipeline, make_mesh, models, schedules, train
from vocabpp_jax.data import load_tokens, training_batches
from vocabpp_jax.models import GPTConfig, reference_loss
from vocabpp_jax.pipeline.mesh import all_devices
from vocabpp_jax.training.optimizer import adamw

STAGES, MICROBATCHES, BATCH = 4, 8, 2
METHODS = ("baseline", "vocab-1", "vocab-2", "interlaced")
REFERENCE = "one device"
CLIP, PEAK_LR, SEED = 1.0, 3e-3, 0
Step = Callable[[Any, dict[str, np.ndarray]], tuple[Any, jax.Array]]


def model_config() -> GPTConfig:
    """Small, with most of its FLOPs in the vocabulary layers."""
    return models.named("gpt-tiny", vocab_size=4096)


def pipelined(method: str, config: GPTConfig, steps: int) -> tuple[Any, Step]:
    """State and train step of a pipeline."""
    schedule = schedules.build("1f1b", method, p=STAGES, m=MICROBATCHES)
    pipe = Pipeline(models.build(config), schedule, make_mesh(STAGES, 1, all_devices()[:STAGES]))
    optimizer = adamw(PEAK_LR, steps, steps // 10)
    step = train.make_step(pipe, optimizer, clip=CLIP)

    def run(state: Any, batch: dict[str, np.ndarray]) -> tuple[Any, jax.Array]:
        state, metrics = step(state, batch)
        return state, metrics["loss"]

    return train.init_state(pipe, optimizer, jax.random.key(SEED)), run


def on_one_device(config: GPTConfig, steps: int) -> tuple[Any, Step]:
    """The same with plain autodiff of the whole model."""
    model = models.build(config)
    decays = jax.tree.map(lambda shape: len(shape.shape) > 1, model.param_shapes())
    optimizer = adamw(PEAK_LR, steps, steps // 10, decay_mask=lambda _: decays)

    @jax.jit
    def run(state: Any, batch: dict[str, jax.Array]) -> tuple[Any, jax.Array]:
        params, moments = state
        loss, grads = jax.value_and_grad(lambda params: reference_loss(model, params, **batch))(params)
        scale = jnp.minimum(1.0, CLIP / (optax.global_norm(grads) + 1e-6))
        updates, moments = optimizer.update(jax.tree.map(lambda g: g * scale, grads), moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    params = model.init(jax.random.key(SEED))
    return (params, optimizer.init(params)), run


def losses(method: str, steps: int, batches: Any) -> Iterator[float]:
    """The loss of every step."""
    config = model_config()
    state, step = on_one_device(config, steps) if method == REFERENCE else pipelined(method, config, steps)
    for k in range(steps):
        state, loss = step(state, {name: batches[k][name] for name in ("tokens", "labels")})
        yield float(loss)


def curves(cache: Path, steps: int, say: Say) -> dict[str, list[float]]:
    """Loss curves by method; cached ones are read."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    config = model_config()
    setup = f"{config} p={STAGES} m={MICROBATCHES} b={BATCH} lr={PEAK_LR} seed={SEED} steps={steps}"
    lines = [json.loads(line) for line in cache.read_text().splitlines()] if cache.exists() else []
    done = {line["method"]: line["losses"] for line in lines if line["setup"] == setup}
    missing = [method for method in (REFERENCE, *METHODS) if method not in done]
    if missing:
        say("reading the corpus")
        tokens = load_tokens("stdlib", vocab_size=config.vocab_size).train
        batches = training_batches(tokens, microbatches=MICROBATCHES, batch=BATCH, seq=config.seq, seed=SEED)
    for method in missing:
        found, told = [], time.monotonic()
        for loss in losses(method, steps, batches):
            found.append(loss)
            if time.monotonic() - told > 5 or len(found) == steps:
                told = time.monotonic()
                say(f"training, {method}: step {len(found)}/{steps}, loss {loss:.4f}")
        done[method] = found
        with cache.open("a") as file:
            file.write(json.dumps({"setup": setup, "method": method, "losses": found}) + "\n")
        jax.clear_caches()
    return {method: done[method] for method in (REFERENCE, *METHODS)}


def differences(found: dict[str, list[float]]) -> list[dict[str, Any]]:
    """How far every method's losses are from one device's."""
    one = np.array(found[REFERENCE])
    return [
        {
            "method": method,
            "first loss": values[0],
            "mean of the last 20": float(np.mean(values[-20:])),
            "largest difference": float(np.max(np.abs(np.array(values) - one))),
            "in the first 20 steps": float(np.max(np.abs(np.array(values) - one)[:20])),
            "mean difference": float(np.mean(np.abs(np.array(values) - one))),
        }
        for method, values in found.items()
    ]


def section(files: Files, say: Say, steps: int = 300) -> str:
    """The page's section on the convergence comparison."""
    found = curves(files.cache / "convergence.jsonl", steps, say)
    lines = differences(found)
    by_step = [{"step": k + 1} | {name: values[k] for name, values in found.items()} for k in range(steps)]
    links = files.csv("convergence", by_step), files.csv("convergence_differences", lines)
    config = model_config()
    exact = [name for name in lines[0] if "difference" in name or "first 20" in name]
    return "\n\n".join(
        [
            f"**Measured** on simulated CPU devices, float32: a GPT of {models.parameters(config):,} parameters "
            f"({config.layers} layers, h={config.hidden}, s={config.seq}, V={config.vocab_size}) trained for {steps} "
            f"steps of {MICROBATCHES * BATCH * config.seq:,} tokens of the Python standard library's sources, AdamW, "
            f"the same seed and data; 1F1B on {STAGES} devices, m={MICROBATCHES}, and plain autodiff on one. The "
            "curves coincide; the remaining differences come from the order of float32 sums, which training carries "
            "on. "
            f"{links[0]}, {links[1]}",
            table(lines, {"first loss": ".4f", "mean of the last 20": ".4f"} | dict.fromkeys(exact, ".1e")),
            files.picture("convergence", _draw(found), "Loss curves of all methods and of one device, overlaid"),
        ]
    )


def _draw(found: dict[str, list[float]]) -> Figure:
    figure, (above, below) = canvas(9, 3.2, 2)
    for method, values in found.items():
        x, color = np.arange(1, len(values) + 1), METHOD_COLORS.get(method, "black")
        above.plot(x, values, color=color, linewidth=1, label=method)
        if method != REFERENCE:
            off = np.maximum.accumulate(np.abs(np.array(values) - found[REFERENCE]))
            below.semilogy(x, np.where(off > 0, off, np.nan), color=color, linewidth=1, label=method)
    above.set_ylabel("loss, nats a token")
    below.set_ylabel(f"largest distance from {REFERENCE} so far")
    above.legend(frameon=False)
    figure.supxlabel("step")
    return figure
