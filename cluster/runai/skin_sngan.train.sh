#!/bin/bash
# The spectrally normalised GAN of skin lesions, on one GPU.
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
train skin_sngan.train \
    --gpu-devices-request 1 --cpu-core-request 8 \
    --cpu-memory-request 48Gi --cpu-memory-limit 48Gi --large-shm
