#!/bin/bash
# StyleGAN2-ADA on images without findings, on eight GPUs of one node.
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
train stylegan2_anomaly.train \
    --gpu-devices-request 8 --cpu-core-request 32 \
    --cpu-memory-request 128Gi --cpu-memory-limit 128Gi --large-shm
