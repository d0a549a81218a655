"""Predictions without running anything: a program's timeline, its cost on a GPU, pictures and file formats."""
