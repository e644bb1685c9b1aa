"""Draw saved embeddings: ``python launch/pictures.py runs/NAME [runs/OTHER ...]``.

Of runs trained with eval.save_embeddings=true, for each test set: features of 2 or 3 dimensions and a GIF of
them over the steps, histograms of cosines, cosines between class means and between the centroids; features
side by side and the bounds of alpha, in the first run's figures. For training images, too, name them a test
set: eval.classification.train=FOLDER.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch._main import run


def main() -> None:
    """Read the command line, draw, print the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument("--wandb", action="store_true", help="show them in the W&B runs too")
    arguments = parser.parse_args()

    from trainer.log import show_in_wandb  # imports torch: only once the command line is right
    from trainer.pictures import draw_runs

    written = draw_runs(arguments.runs)
    for path in written:
        print(path)
    for folder in arguments.runs if arguments.wandb else ():
        show_in_wandb(folder, [path for path in written if path.is_relative_to(folder)])


if __name__ == "__main__":
    run(main)
