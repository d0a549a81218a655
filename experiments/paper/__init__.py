"""The paper's tables and figures (arXiv 2411.05288), one module per kind of result."""
