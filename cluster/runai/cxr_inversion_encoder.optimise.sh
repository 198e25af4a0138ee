#!/bin/bash
# Optimises encoded latents image by image, in shards.
# cxr_inversion_encoder.optimise.sh [SHARDS [NUMBER...]]; when all are done, cxr_inversion_encoder.optimise.sh --merge
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
stage_in_shards cxr_inversion_encoder.optimise 16 \
    --gpu-devices-request 1 --cpu-core-request 8 \
    --cpu-memory-request 32Gi --cpu-memory-limit 32Gi --large-shm
