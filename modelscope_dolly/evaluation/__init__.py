"""`dolly eval`: the seven tasks of the dolly-v2 card, scored by lm-evaluation-harness on a model of any size."""
