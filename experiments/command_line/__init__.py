"""Options shared by the experiments, and command-line parsing."""
