"""From a schedule to the program that runs on every device: events, their order, cells of ring buffers, segments."""
