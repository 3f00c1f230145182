"""Install the torch that Holdfast is developed and tested with: a CPU build unless CUDA is found.

Run it with the interpreter that is to get torch. The version is pinned here and nowhere else.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

TORCH = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def cuda_is_present() -> bool:
    """Whether the NVIDIA driver answers and lists at least one GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listed.returncode == 0 and "GPU" in listed.stdout


def attempts(platform: str, cuda: bool) -> list[list[str]]:
    """What to ask ``pip install`` for, in order, until one succeeds."""
    if cuda:
        # "===" compares the whole string, so that a local CPU wheel "2.13.0+cpu" does not match.
        return [[f"torch==={TORCH}"], [f"torch=={TORCH}"]]
    if platform != "linux":
        return [[f"torch=={TORCH}"]]  # PyPI has CPU (and Apple) builds only.
    cpu = f"torch=={TORCH}+cpu"
    # pip's own configuration comes first: a mirror or a folder of wheels answers without a network.
    # Last, the large CUDA build from PyPI, which runs on a CPU just as well.
    return [[cpu], [cpu, "--extra-index-url", CPU_INDEX], [f"torch=={TORCH}"]]


def main() -> int:
    """Try each request in turn; return pip's last exit status."""
    *early, last = attempts(sys.platform, cuda_is_present())
    for request in early:
        if pip_install("-qqq", *request) == 0:
            return 0
    return pip_install("-qq", *last)  # Only here does a failure end the installation, so say why.


def pip_install(*arguments: str) -> int:
    """The exit status of ``pip install`` under this interpreter."""
    print("pip install", *arguments, flush=True)
    return subprocess.run([sys.executable, "-m", "pip", "install", *arguments]).returncode


if __name__ == "__main__":
    sys.exit(main())
