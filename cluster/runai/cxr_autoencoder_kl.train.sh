#!/bin/bash
# Stage 1 of latent diffusion: the KL autoencoder, on eight GPUs of one node.
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
train cxr_autoencoder_kl.train \
    --gpu-devices-request 8 --cpu-core-request 32 \
    --cpu-memory-request 192Gi --cpu-memory-limit 192Gi --large-shm
