"""List the training images that are probably of somebody else: ``python launch/noise.py runs/NAME``.

For runs with ``head.sub_centroids`` above 1. Writes ``runs/NAME/noise/suspects.jsonl``; train without them:
``data.quarantine=runs/NAME/noise/suspects.jsonl head.sub_centroids=1``.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# `deepspeed launch/noise.py` puts launch/, not the repository, on sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch._main import run


def main() -> None:
    """Read the command line, look through the data, say what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="noise.py"
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="other settings for it")
    parser.add_argument("--degrees", type=float, default=75.0, metavar="A", help="farther than this is noise")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    options = parser.parse_intermixed_args()

    from trainer.log import configure_logging
    from trainer.noise import find_noise  # imports torch: only once the command line is right

    configure_logging(None, int(os.environ.get("RANK", "0")))
    found, path = find_noise(options.run, options.degrees, options.overrides)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    num_suspects, beside = len(found.suspects), found.beside_dominant
    if options.json:
        result = {"images": found.images, "suspects": num_suspects, "beside_dominant": beside}
        print(json.dumps({**result, "list": str(path)}))
    else:
        print(
            f"{num_suspects} of {found.images} images are farther than {options.degrees:g} degrees from the "
            f"dominant centroid of their class, {beside} are nearer to another: {path}"
        )


if __name__ == "__main__":
    run(main)
