#!/bin/bash
# Classifies the images of a data set, in shards.
# augmentation_classifier.predict.sh [SHARDS [NUMBER...]]; when all are done, augmentation_classifier.predict.sh --merge
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
stage_in_shards augmentation_classifier.predict 8 \
    --gpu-devices-request 1 --cpu-core-request 8 \
    --cpu-memory-request 32Gi --cpu-memory-limit 32Gi --large-shm
