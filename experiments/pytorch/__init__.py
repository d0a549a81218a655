"""PyTorch's side of ``compare_pytorch.py``: its model, what Megatron logs, and the comparison's tables."""
