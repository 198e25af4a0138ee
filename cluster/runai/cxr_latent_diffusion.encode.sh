#!/bin/bash
# Encodes the radiographs for latent diffusion, in shards.
# cxr_latent_diffusion.encode.sh [SHARDS [NUMBER...]]; when all are done, cxr_latent_diffusion.encode.sh --merge
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
stage_in_shards cxr_latent_diffusion.encode 8 \
    --gpu-devices-request 1 --cpu-core-request 8 \
    --cpu-memory-request 32Gi --cpu-memory-limit 32Gi --large-shm
