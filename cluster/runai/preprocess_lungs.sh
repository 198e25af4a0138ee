#!/bin/bash
# Radiographs and masks of the lungs, for lung_segmentation: preprocess_lungs.sh [STEP], images and, when that is done, masks
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
steps images masks
options=(--source /data/raw/lungs/images)
[[ $STEP == images ]] || options=(--masks /data/raw/lungs/masks)
preprocess "lungs-$STEP" 1 "preprocessing.$STEP" --target /data/lungs "${options[@]}" --workers 8
