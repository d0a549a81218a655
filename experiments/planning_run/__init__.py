"""Planning: plans compiled in processes of their own, the table, the picture, and a machine's own description."""
