"""The training recipe. Run from a checkout; not part of the installed package."""
