"""What runs during training."""
