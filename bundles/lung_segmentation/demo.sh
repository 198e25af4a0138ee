#!/usr/bin/env bash
# `make demo BUNDLE=lung_segmentation`: from radiographs with masks to boxes around lungs, on two CPU cores.
set -euo pipefail
bundle=$(cd "$(dirname "$0")" && pwd)
cd "$bundle/../.."
source bundles/demo_common.sh
rm -rf "$OUT/demo_lungs"

if [ -z "${DATALIST:-}" ]; then
    show "$PYTHON" -m medgen phantom chestxray14 "$OUT/lung_phantoms" --patients 60 --size 128 --seed 1 --force
    show "$PYTHON" -m preprocessing.chestxray14 --source "$OUT/lung_phantoms" --target "$OUT/lungs" --size 64
    show "$PYTHON" -m preprocessing.masks --target "$OUT/lungs" --masks "$OUT/lung_phantoms/masks" --postfix _lung
    DATALIST=$OUT/lungs/datalist_masks.json
fi
DATALIST=$(absolute "$DATALIST")
data=(--datalist "$DATALIST")
if [ -n "${DATASET_DIR:-}" ]; then data+=(--dataset_dir "$(absolute "$DATASET_DIR")"); fi

cd "$bundle"
run=(--output_dir "$OUT/demo_lungs" --model_path "$OUT/demo_lungs/model.pt")
track=(--tracking configs/tracking.json)
show "$PYTHON" -m monai.bundle run --config_file "['configs/train.json','configs/demo.json']" "${data[@]}" "${run[@]}" "${track[@]}"
show "$PYTHON" -m monai.bundle run --config_file "['configs/evaluate.json','configs/demo.json']" "${data[@]}" "${run[@]}" "${track[@]}"
show "$PYTHON" -m monai.bundle run --config_file "['configs/inference.json','configs/demo.json']" "${data[@]}" \
    --output_dir "$OUT/demo_lungs/segmented" --model_path "$OUT/demo_lungs/model.pt" --mc_passes 10
register lung_segmentation_demo "$OUT/demo_lungs" "$OUT/demo_lungs/metrics.json" "dice>=0.8" configs/demo.json

cat <<TEXT

The demo is done. Look at
  outlines, true (green) and predicted (orange):  $OUT/demo_lungs/images/test.png
  figures of the test split:                      $OUT/demo_lungs/metrics.json
  boxes to crop to:                               $OUT/demo_lungs/segmented/boxes.csv
  masks, outlines with boxes, uncertainty:        $OUT/demo_lungs/segmented
  curves, pictures and the registered model in MLflow:
    $PYTHON -m mlflow ui --backend-store-uri sqlite:///$OUT/demo_lungs/mlflow.db
  a server that answers with the model, as docs/README.md says:
    $SERVE
TEXT
