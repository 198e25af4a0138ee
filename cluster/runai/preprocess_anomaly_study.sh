#!/bin/bash
# Test images of ChestX-ray14, and others of them with a line or a disc drawn in, for stylegan2_anomaly:
# preprocess_anomaly_study.sh [STEP], corrupt and, when that is done, split
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
steps corrupt split
options=(--source /data/chestxray14 --target /data/chestxray14_corrupted --kind line --kind disc --one-each
    --workers 8)
if [[ $STEP == split ]]; then
    options=(--normal /data/chestxray14 --anomalous /data/chestxray14_corrupted --target /data/anomaly_study
        --test_count 1000 --max_anomalous 1000)
fi
preprocess "anomaly-study-$STEP" 1 "preprocessing.$STEP" "${options[@]}"
