"""What ``parity.py`` is made of: one comparison with plain autodiff, and the matrix of all of them."""
