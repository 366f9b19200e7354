"""The training recipe. Run from a checkout; not part of the installed package."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed detects the same, with a warning in every process
