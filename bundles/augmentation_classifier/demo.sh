#!/usr/bin/env bash
# `make demo BUNDLE=augmentation_classifier`: is a rare class told better with images of it that nobody has? On two CPU cores.
set -euo pipefail
bundle=$(cd "$(dirname "$0")" && pwd)
cd "$bundle/../.."
source bundles/demo_common.sh
out=$OUT/demo_augmentation
rm -rf "$out"

if [ -z "${DATALIST:-}" ]; then
    show "$PYTHON" -m medgen phantom isic "$OUT/isic" --patients 300 --size 64 --seed 1 --force
    show "$PYTHON" -m preprocessing.isic --source "$OUT/isic" --target "$OUT/isic_32" --size 32 --binary melanoma
    DATALIST=$OUT/isic_32/datalist.json
fi
DATALIST=$(absolute "$DATALIST")
data=(--datalist "$DATALIST")
if [ -n "${DATASET_DIR:-}" ]; then data+=(--dataset_dir "$(absolute "$DATASET_DIR")"); fi
run=("$PYTHON" -m monai.bundle run --config_file)
# the class that is filled up, the rarer one of the training (of the phantoms melanoma), as the datalist has it and by its
# number; and the last seed, for as many images as it lacks
rarer=$("$PYTHON" - "$DATALIST" <<'CODE'
import collections, json, sys
content = json.load(open(sys.argv[1], encoding="utf-8"))
counts = collections.Counter(item.get("label") for item in content.get("training", [])).most_common()
if len(counts) != 2 or None in dict(counts):
    sys.exit("the demo needs training images of two classes, all with a label; preprocessing.subset --keep A --keep B makes them")
rare = counts[1][0]
number = content.get("label_names", [rare]).index(rare) if isinstance(rare, str) else rare
print(rare, number, max(400, counts[0][1] - counts[1][1]) - 1, sep="\n")
CODE
)
{ read -r label && read -r rare && read -r last; } <<<"$rarer"

# a generator of the rare class, from the training's patients alone, and images of its own
cd "$bundle/../skin_sngan"
show "${run[@]}" "['configs/train.json','configs/demo.json']" "${data[@]}" --label "$label" \
    --output_dir "$out/generator" --model_path "$out/generator/model.pt"
show "${run[@]}" "['configs/inference.json','configs/demo.json']" --model_path "$out/generator/model.pt" \
    --label "$rare" --seeds "0-$last" --output_dir "$out/generated"

# the same steps on real images, and on real images and as many synthetic ones as the rare class lacks
cd "$bundle"
settings=("${data[@]}" --in_channels 3)
for arm in real balanced; do
    show "${run[@]}" "['configs/train.json','configs/demo.json']" "${settings[@]}" --arm $arm \
        --synthetic "$out/generated/datalist.json" --output_dir "$out/$arm" --model_path "$out/$arm/model.pt" \
        --tracking configs/tracking.json
    show "${run[@]}" "['configs/evaluate.json','configs/demo.json']" "${settings[@]}" \
        --output_dir "$out/$arm" --model_path "$out/$arm/model.pt" --tracking configs/tracking.json
done
show "${run[@]}" "['configs/inference.json','configs/demo.json']" "${settings[@]}" --output_dir "$out/probabilities" \
    --model_path "$out/balanced/model.pt"
printf '{"in_channels": 3}\n' >"$out/rgb.json"
register augmentation_classifier_demo "$out/balanced" "$out/balanced/metrics.json" "auroc>=0.6" configs/demo.json \
    "$out/rgb.json"

cat <<TEXT

The demo is done. Look at
  figures of the test, real images alone:         $out/real/metrics.json
  and with the rare class filled up:              $out/balanced/metrics.json
  what each is most wrong about:                  $out/real/images/most_wrong.png
                                                  $out/balanced/images/most_wrong.png
  synthetic images of the rare class:             $out/generated/samples
  probabilities of the test images:               $out/probabilities/predictions.csv
  curves, pictures and the registered model in MLflow:
    $PYTHON -m mlflow ui --backend-store-uri sqlite:///$out/balanced/mlflow.db
  a server that answers with the model, as docs/README.md says:
    $SERVE
One training each says nothing about what synthetic images are worth: docs/README.md has the study that does.
TEXT
