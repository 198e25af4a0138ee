#!/bin/bash
# Draws samples of the progressive growing GAN, in shards.
# cxr_pggan.generate.sh [SHARDS [NUMBER...]]; when all are done, cxr_pggan.generate.sh --merge
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
stage_in_shards cxr_pggan.generate 8 \
    --gpu-devices-request 1 --cpu-core-request 8 \
    --cpu-memory-request 32Gi --cpu-memory-limit 32Gi --large-shm
