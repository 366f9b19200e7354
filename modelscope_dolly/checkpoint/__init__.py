"""Checkpoint directories: found, read, verified, written, quantised."""
