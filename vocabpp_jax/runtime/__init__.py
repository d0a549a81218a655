"""What a long run needs around the step: hosts, faults, metrics, profiles, and what is known of the hardware."""
