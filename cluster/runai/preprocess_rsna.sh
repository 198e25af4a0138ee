#!/bin/bash
# RSNA's challenge to PNGs, and those to crops of the lungs: preprocess_rsna.sh [STEP [SHARDS [NUMBER...]]]; each when the
# one before is done: organise in shards, organise --merge, lung_segmentation.predict.sh in shards and with --merge, crop
# in shards, crop --merge.
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
steps organise crop
options=(--source /data/raw/rsna --target /data/rsna_png)
if [[ $STEP == crop ]]; then
    options=(--source /data/rsna_png --target /data/rsna_512 --preset paper
        --boxes /outputs/lung_segmentation/predict/boxes.csv)
fi
preprocess "rsna-$STEP" 16 preprocessing.rsna "$STEP" "${options[@]}" --workers 8
