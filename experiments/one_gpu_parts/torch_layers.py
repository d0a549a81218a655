"""PyTorch's layer and head on the same GPU, eager and compiled, for comparison with our passes.

The layers are those of :mod:`pytorch_gpt` in bfloat16, forward and backward with accumulated gradients; the head is a
matrix product and a float32 cross-entropy over the whole vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from .gpu_sizes import Size
from .results import Results
from .timing import middle


def measure(size: Size, results: Results) -> None:
    """Time layers and heads; without PyTorch, only note that."""
    if find_spec("torch") is None:
        results.note(skipped="PyTorch is not installed")
        results.done()
        return
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if not cuda:
        torch.set_num_threads(1)
    results.note(environment={"torch": torch.__version__, "device": torch.cuda.get_device_name() if cuda else "cpu"})
    from vocabpp_jax import models

    row = size.stage_row
    config = models.named(row.model)
    seq = row.sequences[0]
    layers = config.layers // row.p
    for compiled in (False, True) if cuda else (False,):
        how = "compiled" if compiled else "eager"
        make = lambda c=compiled: _layers(torch, config, seq, layers, device, c)  # noqa: E731
        name = f"{layers} layers, {how}"
        results.case(
            name, lambda m=make, h=how: {"what": "layers", "how": h} | _timed(torch, m(), size.repeats), needs=5
        )
        for V in size.torch_vocabularies:
            make = lambda V=V, c=compiled: _head(torch, config.hidden, seq, V, device, c)  # noqa: E731
            case = {"what": "head", "how": how, "vocab_size": V}
            results.case(f"head V={V}, {how}", lambda m=make, c=case: c | _timed(torch, m(), size.repeats), needs=5)
    results.note(model=row.model, layers=layers, seq=seq)
    results.done()


def _layers(torch: Any, config: Any, seq: int, layers: int, device: Any, compiled: bool) -> tuple[Callable, Callable]:
    from pytorch.pytorch_gpt import Block, Shape

    shape = Shape(layers=layers, hidden=config.hidden, heads=config.heads, vocab_size=8)
    module = torch.nn.Sequential(*(Block(shape) for _ in range(layers))).to(device, _dtype(torch, device))
    run = torch.compile(module) if compiled else module
    x = torch.randn(1, seq, config.hidden, device=device, dtype=_dtype(torch, device), requires_grad=True)
    g = torch.randn_like(x)
    return (lambda: run(x)), (lambda y: y.backward(g))


def _head(torch: Any, hidden: int, seq: int, V: int, device: Any, compiled: bool) -> tuple[Callable, Callable]:
    from pytorch.pytorch_gpt import token_loss

    head = torch.nn.Linear(hidden, V, bias=False).to(device, _dtype(torch, device))
    run = lambda x, labels: token_loss(head(x), labels)  # noqa: E731
    run = torch.compile(run) if compiled else run
    x = torch.randn(1, seq, hidden, device=device, dtype=_dtype(torch, device), requires_grad=True)
    labels = torch.randint(V, (1, seq), device=device)
    return (lambda: run(x, labels)), (lambda loss: loss.backward())


def _dtype(torch: Any, device: Any) -> Any:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _timed(torch: Any, passes: tuple[Callable, Callable], repeats: int, count: int = 10) -> dict[str, float]:
    """Milliseconds of a forward and of a backward, and the seconds that the first call of each took."""
    forward, backward = passes
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    began = time.monotonic()
    backward(forward())
    wait()
    first = time.monotonic() - began
    for _ in range(3):
        backward(forward())

    def rounds(run: Callable[[], Any]) -> float:
        found = []
        for _ in range(repeats):
            wait()
            at = time.perf_counter()
            for _ in range(count):
                run()
            wait()
            found.append(1e3 * (time.perf_counter() - at) / count)
        return middle(found)

    both = rounds(lambda: backward(forward()))
    only = rounds(forward)
    return {"forward_ms": only, "backward_ms": both - only, "both_ms": both, "first_s": first}
