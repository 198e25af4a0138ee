#!/bin/bash
# A Kubernetes overlay through Run:ai: submit_overlay.sh stylegan2_anomaly.project.runai
# The workload goes to `runai workload submit`, which takes one object; its ConfigMap and Service go to kubectl.
# Of the settings it needs PROJECT; image and claims are those of cluster/kubernetes/site.
set -euo pipefail
# shellcheck source=cluster/runai/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "$@"
take 1
OVERLAY=${ARGUMENTS[0]:?the name of a folder of cluster/kubernetes/overlays}
[[ $OVERLAY =~ ^[a-z0-9_.]+$ && -d $CLUSTER/kubernetes/overlays/$OVERLAY ]] ||
    complain "no overlay $OVERLAY; they are the folders of cluster/kubernetes/overlays"
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
kubectl kustomize "$CLUSTER/kubernetes/overlays/$OVERLAY" >"$WORK/all.yaml"
# objects are divided by lines of ---, and each has its kind at the beginning of a line
awk -v folder="$WORK" '
    function finish() { if (text ~ /[^ \n]/) printf "---\n%s", text > (folder "/" (workload ? "workload.yaml" : "others.yaml")); text = ""; workload = 0 }
    /^---$/ { finish(); next }
    /^kind: (Job|JobSet|PyTorchJob)$/ { workload = 1 }
    { text = text $0 "\n" }
    END { finish() }' "$WORK/all.yaml"
[[ -s $WORK/workload.yaml ]] || complain "the overlay $OVERLAY holds no Job, JobSet or PyTorchJob"
NAME=$(awk '/^metadata:/ { inside = 1; next } /^[^ ]/ { inside = 0 } inside && /^  name: / { print $2; exit }' "$WORK/workload.yaml")
if [[ -n $DRY_RUN ]]; then
    cat "$WORK/all.yaml"
elif [[ -s $WORK/others.yaml ]]; then
    kubectl apply --namespace "runai-$PROJECT" --filename "$WORK/others.yaml"
fi
submit workload submit "$NAME" --file "$WORK/workload.yaml" --project "$PROJECT"
