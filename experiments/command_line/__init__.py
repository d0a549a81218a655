"""The options that the experiments share, and how a script reads its own."""
