#!/bin/bash
# Stage 2 of latent diffusion: the U-Net on encoded images, on eight GPUs of one node.
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
train cxr_latent_diffusion.train \
    --gpu-devices-request 8 --cpu-core-request 32 \
    --cpu-memory-request 128Gi --cpu-memory-limit 128Gi --large-shm
