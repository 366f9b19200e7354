"""Records on their way to batches."""
