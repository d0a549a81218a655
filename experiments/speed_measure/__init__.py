"""Timing on real processors: groups of processes, the stage that each runs, rounds in turn, and the report."""
