#!/bin/bash
# Projects the images of the anomaly study into the latent space, in shards.
# stylegan2_anomaly.project.sh [SHARDS [NUMBER...]]; when all are done, stylegan2_anomaly.project.sh --merge
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
stage_in_shards stylegan2_anomaly.project 16 \
    --gpu-devices-request 1 --cpu-core-request 8 \
    --cpu-memory-request 32Gi --cpu-memory-limit 32Gi --large-shm
