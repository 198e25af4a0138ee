#!/bin/bash
# A classifier that learns from real and synthetic images, on one GPU.
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
train augmentation_classifier.train \
    --gpu-devices-request 1 --cpu-core-request 8 \
    --cpu-memory-request 48Gi --cpu-memory-limit 48Gi --large-shm
