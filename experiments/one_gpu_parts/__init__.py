"""The parts of ``one_gpu.py``: each measures one thing on one GPU and writes one JSON file.

No part needs more than jax, flax, optax and numpy, except :mod:`.torch_layers`, which is skipped without PyTorch.
"""
