#!/usr/bin/env bash
# The same run under torchrun: no ssh, started once on every host (or in every container).
#
#   NODES=2 GPUS=8 FIRST_HOST=node1 launch/cluster/torchrun.sh --config configs/demo.yaml section.field=value
#
# RESTARTS=3 restarts all ranks when one dies; they go on from the newest complete checkpoint. torchrun
# restarts after a user's mistake too, so it is 0 by itself.
set -euo pipefail
: "${NODES:?number of hosts}" "${GPUS:?processes per host}" "${FIRST_HOST:?where the hosts meet}"
# Without it a restarted rank can read an address of the round before: "connectFullMesh failed".
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
cd "$(dirname "$0")/../.."
exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts "${RESTARTS:-0}" \
  --rdzv-backend c10d --rdzv-endpoint "$FIRST_HOST:${PORT:-29400}" --rdzv-id "${JOB:-coco-trainer}" \
  "${SCRIPT:-launch/train.py}" "$@"
