#!/bin/bash
# A training on several nodes: train_on_nodes.sh cxr_latent_diffusion.train 2
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
STAGE=${ARGUMENTS[0]:?the name of a training, such as cxr_latent_diffusion.train}
NODES=${ARGUMENTS[1]:-2}
[[ $STAGE =~ \.train(_[a-z]+)?$ ]] || complain "$STAGE is not a training; the others run in one pod or in shards"
[[ $NODES =~ ^[0-9]+$ && $NODES -ge 2 ]] || complain "expected two nodes or more, got '$NODES'; one node: $STAGE.sh"
train_on_nodes "$STAGE" "$NODES" \
    --gpu-devices-request 8 --cpu-core-request 32 \
    --cpu-memory-request 192Gi --cpu-memory-limit 192Gi --large-shm
