"""Kernels touch no memory that is not theirs, and no two threads the same without order."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


def launched() -> str:
    """A regular expression for this package's kernels: the tools break on some of cuBLAS's."""
    from turboquant_local.kernels import triton

    sources = (path.read_text() for path in Path(triton.__path__[0]).glob("*.py"))
    names = {name for source in sources for name in re.findall(r"^ +(\w+)\[.+\]\(", source, re.MULTILINE)}
    return "|".join(sorted(names))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; CI has none")
@pytest.mark.skipif(not Path(SANITIZER).exists(), reason="needs compute-sanitizer, which comes with CUDA's toolkit")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", "--kernel-name", f"regex={launched()}"]
    script = str(Path(__file__).parent / "every_kernel.py")
    # racecheck cannot follow kernels of which one starts while the other runs.
    late = ["late"] if tool == "racecheck" else []
    done = subprocess.run([*command, sys.executable, script, *late], capture_output=True, text=True, check=False)
    assert "every kernel ran" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.returncode == 0, done.stdout[-2000:]
