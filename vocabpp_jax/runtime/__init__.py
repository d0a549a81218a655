"""What a long run needs around the step: hosts, faults, metrics, profiles, hardware data."""
