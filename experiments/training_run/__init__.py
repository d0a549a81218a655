"""The parts of ``train.py``: its options, and what a run records."""
