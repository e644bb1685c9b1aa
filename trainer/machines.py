"""Accelerators by their data sheets, and the share of them that a training step usually reaches."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A device by its data sheet; ``cpu`` is one thread. Links are per device and direction."""

    memory_gib: float
    """What a process can allocate: below the number in the name."""
    tflops: dict[str, float]
    """Dense 10^12 multiplications and additions per second by type; float32 without TF32."""
    memory_gb_s: float
    inside_gb_s: float
    """To another device of the node: NVLink, or PCIe."""
    between_gb_s: float
    """Share of the node's network, of the usual machine with 8 of them."""
    latency_us: float = 30.0
    """Of one collective, however small."""


GPUS = {
    "h100": Gpu(79.1, {"bfloat16": 989, "float16": 989, "float32": 67}, 3350, 450, 50),
    "a100-80": Gpu(79.2, {"bfloat16": 312, "float16": 312, "float32": 19.5}, 2039, 300, 25),
    "a100-40": Gpu(39.4, {"bfloat16": 312, "float16": 312, "float32": 19.5}, 1555, 300, 25),
    "v100-32": Gpu(31.7, {"float16": 125, "float32": 15.7}, 900, 150, 6.25),
    "v100-16": Gpu(15.8, {"float16": 125, "float32": 15.7}, 900, 150, 6.25),
    "l40s": Gpu(44.4, {"bfloat16": 362, "float16": 362, "float32": 91.6}, 864, 32, 12.5),
    "cpu": Gpu(math.nan, {"bfloat16": 0.2, "float32": 0.12}, 15, 2, 1, latency_us=200.0),
}

# Shares of the data sheet, and how often training passes over what a backbone keeps. Together they give 2690,
# 1140 and 298 images/s for ResNet-50 at 224 pixels on an A100 (mixed), a V100 (mixed) and a V100 (float32);
# NVIDIA DeepLearningExamples publishes 2470, 1200 and 367.
SHARE_OF_TFLOPS = {"bfloat16": 0.5, "float16": 0.5, "float32": 0.65}
SHARE_OF_MEMORY = 0.8
SHARE_OF_LINK = 0.8
PASSES_OVER_ACTIVATIONS = 8

RESERVE_BYTES = {"cpu": 3 << 28, "gpu": 2 << 30}  # libraries, communication buffers, work space
RESERVE_SHARE = {"cpu": 0.0, "gpu": 0.05}  # of the memory: gaps that the allocator cannot use
