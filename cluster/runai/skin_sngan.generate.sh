#!/bin/bash
# Draws skin lesions of both classes, in shards.
# skin_sngan.generate.sh [SHARDS [NUMBER...]]; when all are done, skin_sngan.generate.sh --merge
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
stage_in_shards skin_sngan.generate 8 \
    --gpu-devices-request 1 --cpu-core-request 8 \
    --cpu-memory-request 32Gi --cpu-memory-limit 32Gi --large-shm
