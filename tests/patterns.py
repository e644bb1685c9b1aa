"""Small noisy pictures of identities, and a model that tells them apart to the same bit on any rank."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.bench import Model
from trainer.embed import Reading

SIDE = 6


def embed(images_NCHW: Tensor) -> Tensor:
    """A fixed projection, float64 inside, so that batches and ranks cannot change a bit of it."""
    projection = torch.randn(SIDE * SIDE, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return ((images_NCHW[:, :1].flatten(1).double() - 128) @ projection.to(images_NCHW.device)).float()


MODEL = Model(embed, Reading(image_size=SIDE, channels=1, batch_size=4))


def pattern(identity: int, number: int) -> np.ndarray:
    """A noisy picture of an identity."""
    own = np.random.default_rng(identity).integers(30, 220, (SIDE, SIDE))
    noise = np.random.default_rng(1000 * identity + number + 7).integers(-70, 70, (SIDE, SIDE))
    return np.clip(own + noise, 0, 255).astype(np.uint8)


def embedded(identity: int, number: int) -> Tensor:
    return embed(torch.from_numpy(pattern(identity, number))[None, None])[0]


def save(path: Path, identity: int, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pattern(identity, number)).save(path)


def save_lfw(folder: Path) -> None:
    """Write six people with five pictures each as LFW has them, and its pairs.txt of three folds."""
    for identity in range(6):
        for number in range(1, 6):
            save(folder / f"p{identity}" / f"p{identity}_{number:04d}.png", identity, number)
    lines = ["3\t4"]
    for fold in range(3):
        lines += [f"p{2 * fold}\t{i}\t{i + 1}" for i in range(1, 5)]
        lines += [f"p{2 * fold}\t{i}\tp{2 * fold + 1}\t{i}" for i in range(1, 5)]
    (folder / "pairs.txt").write_text("\n".join(lines) + "\n")


def save_album(folder: Path) -> Path:
    """Write a small album with PIPA's files: photos of 40 x 30 with two persons, halves by photo."""
    everybody = []
    for part, subset, first in (("leftover", 0, 12), ("train", 1, 8), ("val", 2, 0), ("test", 3, 4)):
        lines = []
        for photo in range(8):
            canvas = np.zeros((30, 40), dtype=np.uint8)
            for side in range(2):
                identity = first + (photo + side) % 4
                x = 6 + 18 * side
                # head and, below it, clothes: the upper body is (x - w/2, y, 2 w, 3 h)
                canvas[3:9, x : x + 6] = pattern(identity, photo)
                canvas[9:21, x - 3 : x + 9] = np.kron(pattern(200 + identity, photo), np.ones((2, 2)))
                lines.append(f"{subset}{photo % 3} {photo} {x} 3 6 6 {identity} {subset}")
            path = folder / part / f"{subset}{photo % 3}_{photo}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(canvas).save(path, quality=100)
        everybody += lines
        for split in ("original", "album", "time", "day") if part in ("val", "test") else ():
            halves = "".join(f"{line} {int(line.split()[1]) % 2}\n" for line in lines)
            (folder / f"split_{part}_{split}.txt").write_text(halves)
    (folder / "all_data.txt").write_text("\n".join(everybody) + "\n")
    return folder
