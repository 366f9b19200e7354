"""Checkpoint directories: downloaded, read, verified, written, quantised."""
