#!/usr/bin/env bash
# `make demo BUNDLE=stylegan2_anomaly`: from DICOM files to a tested and registered detector, on two CPU cores.
set -euo pipefail
bundle=$(cd "$(dirname "$0")" && pwd)
cd "$bundle/../.."
source bundles/demo_common.sh
rm -rf "$OUT/demo_detector" "$OUT/demo_corrupted"

if [ -z "${DATALIST:-}" ]; then
    show "$PYTHON" -m medgen phantom chest "$OUT/normal_phantoms" --patients 150 --size 128 --seed 1 --anomaly-fraction 0 --force
    show "$PYTHON" -m preprocessing.images --source "$OUT/normal_phantoms/images" --target "$OUT/normal" --size 64
    DATALIST=$OUT/normal/datalist.json
fi
DATALIST=$(absolute "$DATALIST")
data=(--datalist "$DATALIST")
if [ -n "${DATASET_DIR:-}" ]; then data+=(--dataset_dir "$(absolute "$DATASET_DIR")"); fi
show "$PYTHON" -m preprocessing.corrupt --source "$DATALIST" "${data[@]:2}" --target "$OUT/demo_corrupted" --kind disc \
    --keep-originals

cd "$bundle"
run=(--output_dir "$OUT/demo_detector" --model_path "$OUT/demo_detector/model.pt")
track=(--tracking configs/tracking.json)
show "$PYTHON" -m monai.bundle run --config_file "['configs/train.json','configs/demo.json']" "${data[@]}" "${run[@]}" "${track[@]}"
show "$PYTHON" -m monai.bundle run --config_file "['configs/generate.json','configs/demo.json']" --seeds 0-31 \
    --output_dir "$OUT/demo_detector/generated" --model_path "$OUT/demo_detector/model.pt"
show "$PYTHON" -m monai.bundle run --config_file "['configs/evaluate.json','configs/demo.json']" \
    --datalist "$OUT/demo_corrupted/datalist.json" "${run[@]}" "${track[@]}"
register stylegan2_anomaly_demo "$OUT/demo_detector" "$OUT/demo_detector/metrics.json" "auroc_mse_patch>=0.6" configs/demo.json

cat <<TEXT

The demo is done. Its network has seen four thousand images where a real one sees millions: smooth or grainy thoraces are
what to expect, and a detector that finds the white discs but little else. Look at
  training images above generated ones:        $OUT/demo_detector/images/samples_*.png
  images of seeds 0 to 31:                     $OUT/demo_detector/generated/images/grid.png
  originals, reconstructions, difference:      $OUT/demo_detector/images/test.png
  ROC curves:                                  $OUT/demo_detector/images/roc.png
  scores, one row an image:                    $OUT/demo_detector/scores.csv
  AUROC with intervals, localisation rate:     $OUT/demo_detector/metrics.json
  curves, pictures and the registered model in MLflow:
    $PYTHON -m mlflow ui --backend-store-uri sqlite:///$OUT/demo_detector/mlflow.db
  a server that answers with the model, as docs/README.md says:
    $SERVE
TEXT
