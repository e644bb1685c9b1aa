"""What of requirements.lock an image installs: ``lock.py cuda|cpu|torch requirements.lock``.

``cuda`` prints all of it. ``cpu`` leaves out torch and torchvision, whose CPU builds come from an index of
their own under other hashes, and what only the CUDA builds need. ``torch`` prints the two, name==version.
Runs on a bare Python, before anything is installed.
"""

import platform
import re
import sys
from pathlib import Path

TORCH = ("torch", "torchvision")
CUDA_ONLY = ("nvidia-", "cuda-", "triton")


def entries(lock: str) -> list[str]:
    """Return the entries of the lock, each with its hashes and without its comments."""
    lines = [line for line in lock.splitlines() if not line.lstrip().startswith("#")]
    return re.split(r"\n(?=\S)", "\n".join(lines).strip())


def without_cuda(lock: str) -> str:
    """Return the entries that a CPU image installs from the lock."""
    kept = (e for e in entries(lock) if not e.startswith(CUDA_ONLY) and e.split("==")[0] not in TORCH)
    return "\n".join(kept)


def torch_pins(lock: str, machine: str) -> list[str]:
    """Return ``name==version`` of torch and torchvision on such a machine (``platform.machine()``)."""
    other = "platform_machine != 'aarch64'" if machine == "aarch64" else "platform_machine == 'aarch64'"
    heads = (entry.split("\\")[0] for entry in entries(lock))
    return [h.split(";")[0].strip() for h in heads if h.split("==")[0] in TORCH and other not in h]


if __name__ == "__main__":
    variant, text = sys.argv[1], Path(sys.argv[2]).read_text()
    if variant not in ("cuda", "cpu", "torch"):
        sys.exit(f"error: VARIANT={variant}: is neither cuda nor cpu")
    if variant == "torch":
        print(*torch_pins(text, platform.machine()), sep="\n")
    else:
        print(text if variant == "cuda" else without_cuda(text))
