"""PyTorch's side of ``compare_pytorch.py``: its model, Megatron logs, and the comparison's tables."""
