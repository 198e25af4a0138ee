#!/bin/bash
# Skin lesions to PNGs and a datalist: preprocess_isic.sh [SHARDS [NUMBER...]]; when all are done, with --merge
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
preprocess isic 8 preprocessing.isic --source /data/raw/isic --target /data/isic --binary melanoma --workers 8
