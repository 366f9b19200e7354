"""The decode engine: token ids in, token ids out; it never sees text."""
