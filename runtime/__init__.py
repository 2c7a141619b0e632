"""What a process stands on: the environment seam, configuration, logging, start and stop."""
