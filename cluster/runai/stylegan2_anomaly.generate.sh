#!/bin/bash
# Draws samples of StyleGAN2, in shards.
# stylegan2_anomaly.generate.sh [SHARDS [NUMBER...]]; when all are done, stylegan2_anomaly.generate.sh --merge
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
stage_in_shards stylegan2_anomaly.generate 8 \
    --gpu-devices-request 1 --cpu-core-request 8 \
    --cpu-memory-request 32Gi --cpu-memory-limit 32Gi --large-shm
