"""Measurements: against PyTorch, against the device's limits, and in counts that need no Mac."""
