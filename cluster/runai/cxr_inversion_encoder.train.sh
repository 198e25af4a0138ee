#!/bin/bash
# The encoder of a frozen generator learns from radiographs, on two GPUs.
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
train cxr_inversion_encoder.train \
    --gpu-devices-request 2 --cpu-core-request 16 \
    --cpu-memory-request 64Gi --cpu-memory-limit 64Gi --large-shm
