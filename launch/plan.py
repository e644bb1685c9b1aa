"""Tell memory, checkpoints, traffic and time of a step for K classes on N GPUs, before renting them.

python launch/plan.py --classes 100000000 --batch 8192 --backbone resnet50 --nodes 8 --gpus-per-node 8 \\
    --gpu h100
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch._main import run


def main() -> None:
    """Read the command line, print the plan."""
    options = build_parser().parse_args()
    from trainer.headcost import read_profile
    from trainer.plan import Job, check_gpu, count_backbone  # torch: 5 s
    from trainer.plansheet import plan, table

    check_gpu(options.gpu)
    job = Job(
        classes=options.classes,
        dim=options.dim,
        batch=options.batch,
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        gpu=options.gpu,
        backbone=count_backbone(options.backbone, options.image_size, options.dim),
        state_dtype=options.state_dtype,
        optimizer=options.optimizer,
        dtype=options.dtype,
        cache_mib=options.cache_mib,
        accumulation_steps=options.accumulation_steps,
        profile=read_profile(options.profile) if options.profile else None,
    )
    print(json.dumps(plan(job)) if options.json else table(job))


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="plan.py"
    )
    add = parser.add_argument
    add("--classes", type=int, required=True, metavar="K", help="over all ranks")
    add("--dim", type=int, default=512, metavar="D", help="width of the embedding (default: 512)")
    add("--batch", type=int, required=True, metavar="B", help="images of a step over all ranks")
    add("--backbone", required=True, metavar="NAME", help="any timm model")
    add("--image-size", type=int, metavar="PIXELS", help="side of the input (default: the model's own)")
    add("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    add("--gpus-per-node", type=int, default=1, metavar="G", help="GPUs, or processes of a CPU (default: 1)")
    add("--gpu", required=True, metavar="NAME", help="h100, a100-80, a100-40, v100-32, v100-16, l40s or cpu")
    add("--state-dtype", choices=("float32", "bfloat16"), default="float32", help="head.state_dtype")
    add("--optimizer", choices=("sgd", "adamw", "row_adagrad"), default="sgd", help="of the rows")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="engine.dtype")
    add("--cache-mib", type=int, metavar="M", help="head.cache_mib (default: the head's own choice)")
    add("--accumulation-steps", type=int, default=1, metavar="A", help="micro-batches (default: 1)")
    add("--profile", type=Path, metavar="FILE", help="lines of `launch/benchmark.py head` on such a machine")
    add("--json", action="store_true", help="one JSON object instead of tables")
    return parser


if __name__ == "__main__":
    run(main)
