"""What of requirements.lock goes into which layer of the image, as a requirements file for pip.

    lock.py torch cuda|cpu requirements.lock INDEX_OF_CPU_BUILDS
    lock.py rest requirements.lock

``torch``: torch, torchvision and the CUDA libraries, or their CPU builds alone, which come from an index of
their own under other hashes. ``rest``: everything else. Runs on a bare Python, before anything is installed.
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


def rest(lock: str) -> str:
    """Return the requirements of both images beside torch."""
    kept = (e for e in entries(lock) if not e.startswith(CUDA_ONLY) and e.split("==")[0] not in TORCH)
    return "\n".join(["--require-hashes", *kept])


def torch_and_cuda(lock: str) -> str:
    """Return the requirements of torch's layer in an image for GPUs."""
    kept = (e for e in entries(lock) if e.startswith(CUDA_ONLY) or e.split("==")[0] in TORCH)
    return "\n".join(["--require-hashes", *kept])


def torch_for_cpu(lock: str, index: str, machine: str) -> str:
    """Return the requirements of torch's layer in an image for CPU (``platform.machine()``)."""
    other = "platform_machine != 'aarch64'" if machine == "aarch64" else "platform_machine == 'aarch64'"
    heads = (entry.split("\\")[0] for entry in entries(lock))
    pins = [h.split(";")[0].strip() for h in heads if h.split("==")[0] in TORCH and other not in h]
    return "\n".join([f"--index-url {index}", *pins])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["torch", "cuda", path, _]:
            print(torch_and_cuda(Path(path).read_text()))
        case ["torch", "cpu", path, index]:
            print(torch_for_cpu(Path(path).read_text(), index, platform.machine()))
        case ["rest", path]:
            print(rest(Path(path).read_text()))
        case ["torch", variant, *_]:
            sys.exit(f"error: VARIANT={variant}: is neither cuda nor cpu")
        case _:
            sys.exit(__doc__)
