#!/bin/bash
# Trains and measures each preset, in shards: one each of the twelve.
# skin_sngan.study.sh [SHARDS [NUMBER...]]; when all are done, skin_sngan.study.sh --merge
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
stage_in_shards skin_sngan.study 12 \
    --gpu-devices-request 1 --cpu-core-request 8 \
    --cpu-memory-request 32Gi --cpu-memory-limit 32Gi --large-shm
