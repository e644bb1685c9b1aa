"""Write the embeddings of a data set: memory-mapped .npy files, labels and keys, for millions of images.

python launch/embed.py RUN DATA OUT     RUN as for launch/evaluate.py; DATA packed, or a folder of images

The same under ``deepspeed`` or ``torchrun``: files are dealt to the ranks. Interrupted, it goes on with the
files that are not there yet. ``launch/evaluate.py --protocol NAME --data OUT`` reads them.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# `deepspeed launch/embed.py` puts launch/, not the repository, on sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch._main import at_least, run


def main() -> None:
    """Read the command line, embed, say what was written."""
    options = build_parser().parse_args()

    from trainer.log import configure_logging  # torch: only once the command line is right
    from trainer.models import embed_data

    rank = int(os.environ.get("RANK", "0"))
    configure_logging(None, rank)
    summary = embed_data(
        options.run,
        options.data,
        options.out,
        dtype=options.dtype,
        rows_per_file=options.rows_per_file,
        batch_size=options.batch_size,
        workers=options.workers,
        flip_sum=options.flip,
        skip_broken=options.missing == "count",
    )
    if rank == 0:
        print(json.dumps(summary) if options.json else "\n".join(f"{k}: {v}" for k, v in summary.items()))


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="embed.py"
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a run, one of its checkpoints, or an ONNX file")
    add("data", type=Path, metavar="DATA", help="packed data set, or a folder of images")
    add("out", type=Path, metavar="OUT", help="folder to write, or to go on with")
    add("--dtype", choices=("float16", "float32"), default="float16", help="of the files (default: float16)")
    add("--rows-per-file", type=at_least(1), default=16384, metavar="N", help="images (default: 16384)")
    add(
        "--batch-size",
        type=at_least(1),
        default=64,
        metavar="B",
        help="images of a batch of a rank (default: 64)",
    )
    add("--workers", type=at_least(0), default=2, metavar="W", help="processes that read (default: 2)")
    add("--flip", action="store_true", help="add the embedding of the mirror image")
    add("--missing", choices=("error", "count"), default="error", help="images that cannot be decoded")
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return parser


if __name__ == "__main__":
    run(main)
