"""Table 4, Figure 2 and Figure 3: vocabulary layers relative to transformer layers. Computed; the FLOPs also counted by
the compiler in our own layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from paper.page import Files, Say, canvas
from reports.markdown import table
from vocabpp_jax import models, vocab
from vocabpp_jax.models import GPTConfig
from vocabpp_jax.schedules.layers import even_split, head_in_layers, optimal_split, published_split
from vocabpp_jax.schedules.simulation.cost import Sizes
from vocabpp_jax.vocab import Coefficients, Kept, Shard, Stats, Target

GEMMA2_9B = {"hidden": 3584, "layers": 42}
"""The model of Figure 2; its layers are counted as a GPT's of this width."""
PUBLISHED_TABLE_4 = {
    "transformer": ("bsh(72h + 12s)", "12h²"),
    "input": ("3bsh", "hV"),
    "output": ("6bshV", "hV"),
}
VOCABULARIES = tuple(2**k * 1000 for k in range(5, 9))


def table4(z: Sizes) -> dict[str, tuple[int, int]]:
    """FLOPs of a microbatch and parameters of a transformer layer, the input layer and the output layer."""
    return {
        "transformer": (z.layer_flops, z.layer_parameters),
        "input": (z.embedding_flops, z.table_parameters),
        "output": (z.head_flops, z.table_parameters),
    }


# --- counted by the compiler -----------------------------------------------------------------------------------------


def flops(function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> float:
    """FLOPs that the compiler counts in a function."""
    return float(jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"])


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def output_layer(rows: int, tokens: int, hidden: int) -> dict[str, float]:
    """FLOPs of S and T of one shard, by algorithm, as implemented in :mod:`vocabpp_jax.vocab`."""
    shard = Shard(0, rows)
    w, x, grad, labels = (
        _array(rows, hidden),
        _array(tokens, hidden),
        _array(rows, hidden),
        _array(tokens, dtype=jnp.int32),
    )
    p, vector = _array(tokens, rows), _array(tokens)
    of_shards, kept = Stats(*(_array(1, tokens),) * 3), Kept(p, vector, None, None, None)

    def S(w, x, labels):
        return vocab.exponentials(vocab.logits(w, x, shard), labels, shard, jnp.float32)

    def S2(w, x, labels):
        kept, stats = S(w, x, labels)
        return kept, stats, vocab.unscaled_input_gradient(kept, w)

    def behind_the_barrier(kept, labels, of_shards, weight) -> tuple[Coefficients, Target]:
        target = Target(weight, labels, shard)
        return vocab.coefficients(of_shards, 0, kept, target, rows), target

    def T(kept, labels, of_shards, weight, w, x, grad):
        at, target = behind_the_barrier(kept, labels, of_shards, weight)
        return vocab.input_gradient(kept, w, at, target), vocab.weight_gradient(grad, kept, x, at, target)

    def T2(kept, labels, of_shards, weight, x, grad):
        return vocab.weight_gradient(grad, kept, x, *behind_the_barrier(kept, labels, of_shards, weight))

    after = (kept, labels, of_shards, vector)
    return {
        "vocab-1": flops(S, w, x, labels) + flops(T, *after, w, x, grad),
        "vocab-2": flops(S2, w, x, labels) + flops(T2, *after, x, grad),
    }


def input_layer(rows: int, tokens: int, hidden: int) -> float:
    """FLOPs of IF and IB of one shard."""
    ids, x, w = _array(tokens, dtype=jnp.int32), _array(tokens, hidden), _array(rows, hidden)
    return flops(lambda w, ids: vocab.lookup(w, ids, 0), w, ids) + flops(
        lambda w, ids, g: vocab.scatter(w, ids, 0, g), w, ids, x
    )


def transformer_layer(tokens: int, hidden: int) -> float:
    """FLOPs of one of our blocks, forward and backward, without recomputation."""
    config = GPTConfig(
        layers=1, heads=hidden // 64, hidden=hidden, seq=tokens, vocab_size=8, residuals="everything", dtype="float32"
    )
    model = models.build(config)

    def both(params, x, g):
        y, back = jax.vjp(lambda params, x: model.block(params, x, {}), params, x)
        return y, back(g)

    params = model.param_shapes()["blocks"][0]
    return flops(both, params, _array(1, tokens, hidden), _array(1, tokens, hidden))


def counted() -> list[dict[str, Any]]:
    """Formula and compiler count on small shapes, one line per layer."""
    tokens, hidden, V = 256, 512, 2048
    z = Sizes(layers=1, hidden=hidden, seq=tokens, vocab_size=V)
    output = output_layer(V, tokens, hidden)
    lines = [
        ("transformer", z.layer_flops, transformer_layer(tokens, hidden)),
        ("output, Algorithm 1", z.head_flops, output["vocab-1"]),
        ("output, Algorithm 2", z.head_flops, output["vocab-2"]),
        ("output, Algorithm 1, one of 8 shards", z.head_flops / 8, output_layer(V // 8, tokens, hidden)["vocab-1"]),
        ("input", z.embedding_flops, input_layer(V, tokens, hidden)),
    ]
    return [
        {"layer": name, "formula": float(formula), "compiler": found, "compiler / formula": found / formula}
        for name, formula, found in lines
    ]


# --- the figures -----------------------------------------------------------------------------------------------------


def figure2(seq: int = 4096) -> list[dict[str, float]]:
    """Compute and parameters of Gemma2-9B's vocabulary layers, in transformer layers, by vocabulary size."""
    lines = []
    for V in VOCABULARIES:
        layers = table4(Sizes(**GEMMA2_9B, seq=seq, vocab_size=V))
        compute, memory = (
            {name: amount[n] / layers["transformer"][n] for name, amount in layers.items()} for n in (0, 1)
        )
        lines.append(
            {
                "vocabulary": V,
                "output, compute": compute["output"],
                "output, parameters": memory["output"],
                "input, compute": compute["input"],
                "input, parameters": memory["input"],
            }
        )
    return lines


def figure3(stages: int = 16, seq: int = 2048, V: int = 128_000) -> list[dict[str, Any]]:
    """Compute and parameters of every stage of the 7B model in transformer layers, by layer split."""
    size = models.named("7B", seq=seq, vocab_size=V)
    z = models.cost_sizes(size)
    rho, mu = head_in_layers(size.hidden, seq, V), z.table_parameters / z.layer_parameters
    splits = {
        "even": even_split(size.layers, stages),
        "redistributed as published": published_split(size.layers, stages, rho),
        "redistributed optimally": optimal_split(size.layers, stages, rho),
    }
    return [
        {
            "split": name,
            "stage": stage,
            "layers": n,
            "compute": n + rho * (stage == stages - 1),
            "parameters": n + mu * (stage in (0, stages - 1)),
        }
        for name, split in splits.items()
        for stage, n in enumerate(split)
    ]


def section(files: Files, say: Say) -> str:
    """The page's section on Table 4 and Figures 2 and 3."""
    say("counting FLOPs of small layers with the compiler")
    checked, two, three = counted(), figure2(), figure3()
    links = files.csv("table4", checked), files.csv("figure2", two), files.csv("figure3", three)
    rho, mu = (three[15][key] - three[15]["layers"] for key in ("compute", "parameters"))
    slowest = {row["split"]: max(r["compute"] for r in three if r["split"] == row["split"]) for row in three}
    average = 2 + rho / 16
    formulas = [
        {"layer": name, "FLOPs of a microbatch": a, "parameters": b} for name, (a, b) in PUBLISHED_TABLE_4.items()
    ]
    return "\n\n".join(
        [
            "Table 4, **computed**, and counted by the compiler in our own layers (`cost_analysis` of the compiled "
            "forward and backward, float32, b=1, s=256, h=512, V=2048, CPU). The compiler also counts softmax, norms "
            f"and activations, which the formulas leave out, but no gathers. {links[0]}",
            table(formulas),
            table(checked, {"formula": ".4g", "compiler": ".4g", "compiler / formula": ".3f"}),
            "Figure 2, **computed**: vocabulary layers of Gemma2-9B (h=3584, s=4096) in units of transformer layers. "
            f"{links[1]}",
            files.picture("figure2", _draw2(two), "Weight of Gemma2-9B's vocabulary layers by vocabulary"),
            f"Figure 3, **computed**: the 7B model with V=128k on 16 stages of two layers. The output layer weighs "
            f"{rho:.2f} layers in compute and {mu:.2f} in parameters (published: 2.4 and 2.6). In layers, the slowest "
            f"stage has {slowest['even']:.2f} with an even split, {slowest['redistributed as published']:.2f} with the "
            f"published redistribution and {slowest['redistributed optimally']:.2f} with the best; sharding the "
            f"vocabulary gives every stage {average:.2f}. {links[2]}",
            files.picture("figure3", _draw3(three), "Compute and parameters of every stage, even and redistributed"),
        ]
    )


def _draw2(lines: list[dict[str, float]]) -> Figure:
    figure, axes = canvas(8, 3, 2)
    x = np.arange(len(lines))
    for ax, kind in zip(axes, ("compute", "parameters"), strict=True):
        for n, (layer, color) in enumerate((("input", "#66ccee"), ("output", "#4477aa"))):
            ax.bar(x + 0.35 * n, [row[f"{layer}, {kind}"] for row in lines], 0.35, label=layer, color=color)
        ax.axhline(1, color="black", linewidth=0.8, linestyle=":")
        ax.set_xticks(x + 0.17, [f"{row['vocabulary'] // 1000}k" for row in lines])
        ax.set_ylabel(f"{kind}, in transformer layers")
    axes[0].legend(frameon=False)
    figure.supxlabel("vocabulary")
    return figure


def _draw3(lines: list[dict[str, Any]]) -> Figure:
    figure, axes = canvas(9, 3, 2)
    for ax, split in zip(axes, ("even", "redistributed as published"), strict=True):
        rows = [row for row in lines if row["split"] == split]
        x = np.arange(len(rows))
        ax.bar(x, [row["compute"] for row in rows], 0.4, label="compute", color="#4477aa")
        ax.bar(x + 0.4, [row["parameters"] for row in rows], 0.4, label="parameters", color="#ccbb44")
        ax.set_title(split)
        ax.set_xlabel("stage")
    axes[0].set_ylabel("in transformer layers")
    axes[0].legend(frameon=False)
    return figure
