"""From a checkpoint to a revision on the hub."""
