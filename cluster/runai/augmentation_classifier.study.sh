#!/bin/bash
# Trains and tests each arm with each seed, in shards: two trainings in each of 25.
# augmentation_classifier.study.sh [SHARDS [NUMBER...]]; when all are done, augmentation_classifier.study.sh --merge
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
stage_in_shards augmentation_classifier.study 25 \
    --gpu-devices-request 1 --cpu-core-request 8 \
    --cpu-memory-request 48Gi --cpu-memory-limit 48Gi --large-shm
