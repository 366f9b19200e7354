"""Speculative decoding: proposers of draft tokens, and how many of them one step verifies."""
