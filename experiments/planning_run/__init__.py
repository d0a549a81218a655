"""Planning: plans compiled in separate processes, the table, the plot, and a description of the local machine."""
