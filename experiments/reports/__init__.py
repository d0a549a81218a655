"""What the experiments write for people to read."""
