#!/usr/bin/env bash
# `make demo BUNDLE=cxr_pggan`: from the RSNA challenge's files to radiographs of two classes, on two CPU cores.
set -euo pipefail
bundle=$(cd "$(dirname "$0")" && pwd)
cd "$bundle/../.."
source bundles/demo_common.sh
out=$OUT/demo_pggan
rm -rf "$out"
run=("$PYTHON" -m monai.bundle run --config_file)

if [ -z "${DATALIST:-}" ]; then
    # a U-Net that finds the lungs, trained on phantoms whose lungs are known
    show "$PYTHON" -m medgen phantom chestxray14 "$OUT/crop_phantoms" --patients 60 --size 128 --seed 2 --force
    show "$PYTHON" -m preprocessing.chestxray14 --source "$OUT/crop_phantoms" --target "$OUT/crop_lungs" --size 64
    show "$PYTHON" -m preprocessing.masks --target "$OUT/crop_lungs" --masks "$OUT/crop_phantoms/masks" --postfix _lung \
        || [ $? = 3 ] # masks of the findings have no image of that name
    cd "$bundle/../lung_segmentation"
    show "${run[@]}" "['configs/train.json','configs/demo.json']" --datalist "$OUT/crop_lungs/datalist_masks.json" \
        --output_dir "$out/lungs" --model_path "$out/lungs/model.pt"
    cd ../..
    # the challenge's layout: DICOM, two tables, and which images are of one patient
    show "$PYTHON" -m medgen phantom rsna "$OUT/rsna" --patients 150 --size 128 --seed 1 --force
    show "$PYTHON" -m preprocessing.rsna organise --source "$OUT/rsna" --target "$OUT/rsna_png" --size 128
    cd "$bundle/../lung_segmentation"
    show "${run[@]}" "['configs/inference.json','configs/demo.json']" --datalist "$OUT/rsna_png/datalist.json" --split all \
        --output_dir "$out/lung_boxes" --model_path "$out/lungs/model.pt"
    cd ../..
    # exit code 3: images in which no lung was found are named in rejected.csv
    show "$PYTHON" -m preprocessing.rsna crop --source "$OUT/rsna_png" --target "$OUT/rsna_32" \
        --boxes "$out/lung_boxes/boxes.csv" --size 32 || [ $? = 3 ]
    DATALIST=$OUT/rsna_32/datalist.json
fi
DATALIST=$(absolute "$DATALIST")
data=(--datalist "$DATALIST")
if [ -n "${DATASET_DIR:-}" ]; then data+=(--dataset_dir "$(absolute "$DATASET_DIR")"); fi

cd "$bundle"
show "${run[@]}" "['configs/train.json','configs/demo.json']" "${data[@]}" \
    --output_dir "$out/training" --model_path "$out/training/model.pt" --tracking configs/tracking.json
show "${run[@]}" "['configs/inference.json','configs/demo.json']" --model_path "$out/training/model.pt" --seeds 0-63 \
    --output_dir "$out/generated"
show "${run[@]}" "['configs/interpolate.json','configs/demo.json']" --model_path "$out/training/model.pt" --seeds 0-3 \
    --frames 40 --output_dir "$out/film"
show "${run[@]}" "['configs/evaluate.json','configs/demo.json']" "${data[@]}" --model_path "$out/training/model.pt" \
    --output_dir "$out/evaluation" --tracking configs/tracking.json
register cxr_pggan_demo "$out/training" "$out/evaluation/metrics.json" "swd<=150" configs/demo.json

cat <<TEXT

The demo is done. Its network has seen twelve thousand images where a real one sees fifteen million: smudged thoraces of 32
pixels are what to expect. Look at
  lungs that were found, and the boxes around them: $out/lung_boxes/overlays/
  one picture for each stage of the growth:         $out/training/images/samples_*.png
  weights at the end of each level:                 $out/training/levels/
  images of seeds 0 to 63:                          $out/generated/images/grid.png
  a walk from image to image:                       $out/film/images/interpolation.gif
  generated images above real ones:                 $out/evaluation/images/samples_over_test.png
  figures with a real-against-real baseline:        $out/evaluation/metrics.json
  curves, pictures and the registered model in MLflow:
    $PYTHON -m mlflow ui --backend-store-uri sqlite:///$out/training/mlflow.db
  a server that answers with the model, as docs/README.md says:
    $SERVE
TEXT
