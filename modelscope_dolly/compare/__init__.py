"""`dolly compare`: two models answer the same instructions, and read the same held-out answers, side by side."""
