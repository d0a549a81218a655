"""Timing on real hardware: groups of processes, the stage that each runs, timing in turns, and the report."""
