"""What ``train.py`` is made of: its options, and what a run records."""
