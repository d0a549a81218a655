"""The parts of ``parity.py``: a single comparison with plain autodiff, and the matrix of all of them."""
