"""The parts of ``simulate.py``: its options, its results, and what was measured beside them."""
