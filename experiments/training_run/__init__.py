"""The parts of ``train.py``: its options, its preparation, and what a run records."""
