"""Output of the experiments for people to read."""
