"""For every test: nothing is sent or fetched, and Triton's kernels run in its interpreter where there is no GPU."""

import os

import torch

os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():  # must be said before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
