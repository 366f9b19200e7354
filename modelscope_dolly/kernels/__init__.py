"""What computes faster than torch's own operations, and falls back to them."""
