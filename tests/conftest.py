"""For every test: nothing is sent or fetched, one thread computes, and Triton's kernels run without a GPU too."""

import os

# Before torch is imported. More threads gain nothing on models this small, and when something else needs a core they
# wait for each other: on two busy cores, tests were seen to take 30 times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():  # must be said before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
