#!/usr/bin/env bash
# Try the image where no container engine is: what the Dockerfile copies and sets, in a file system of its own, whose
# root is read-only, as a user without passwd entry or capabilities; there the demo of cxr_autoencoder_kl runs through
# the cluster's args files, on two processes.
#   sudo cluster/try_without_engine.sh [FOLDER [UID]]
# needs Linux, root, Python 3.11 and 8 GB in FOLDER. Works in FOLDER/medgen_image alone, which keeps the environment for
# the next time: delete it.
set -euo pipefail
refuse() {
    printf '%s\n' "$1" >&2
    exit 2
}
here=$(cd "$(dirname "$0")" && pwd)
parent=$(realpath -m "${1:-/var/tmp}") uid=${2:-54321}
folder=$parent/medgen_image
marker=$folder/.made_by_try_without_engine
[[ $uid =~ ^[1-9][0-9]*$ ]] || refuse "expected a number above 0 as UID, got '$uid'; call $0 $parent 54321"
if getent passwd "$uid" >/dev/null; then
    refuse "expected a UID without passwd entry, got $uid; choose another: $0 $parent UID"
fi
# all but the environment is deleted below: nothing may be there that this script has not made, as this user
if mkdir -p "$parent" && mkdir "$folder" 2>/dev/null; then
    touch "$marker"
elif [ -L "$folder" ] || [ ! -O "$folder" ] || [ ! -O "$marker" ]; then
    refuse "expected no $folder, or one that this script made as this user; move it away, or choose another FOLDER"
fi
python=$("${PYTHON:-python3.11}" -c "import os, sys; print(os.path.realpath(sys.executable))")

if [ "${INSIDE:-}" != 1 ]; then
    mkdir -p "$folder"/{venv,root}
    INSIDE=1 PYTHON=$python exec unshare --mount --propagation private "$0" "$parent" "$uid"
fi

# COPY . /opt/medgen: what .dockerignore lets through; nothing there is writable
rm -rf "$folder"/{medgen,tmp,data,outputs}
mkdir "$folder"/{medgen,tmp,data,outputs}
(cd "$here/.." && "$python" cluster/image.py files | tar --create --files-from - --owner 0 --group 0) |
    tar --extract --directory "$folder/medgen"
chmod -R a+rX,a-w "$folder/medgen"
chmod 775 "$folder"/{data,outputs} # the group is 0
chmod 1777 "$folder/tmp"

# the system, the interpreter and the folders of the image at their places below a root of its own
root=$folder/root
mount -t tmpfs -o mode=755 tmpfs "$root"
interpreter=$("$python" -c 'import sys; print(sys.base_prefix)')
place() { # place SOURCE TARGET [OPTIONS]
    mkdir -p "$root$2"
    mount --rbind "$1" "$root$2"
    if [ -n "${3:-}" ]; then mount -o "remount,bind,$3" "$root$2"; fi
}
for part in /bin /sbin /lib /lib64; do # links into /usr, or folders
    if [ -L "$part" ]; then cp -P "$part" "$root$part"; elif [ -e "$part" ]; then place "$part" "$part" ro; fi
done
place /usr /usr ro
if [ -e "$root/usr/bin/git" ]; then mount --bind /dev/null "$root/usr/bin/git"; fi # the image has none
place /etc /etc ro
place /proc /proc
place /dev /dev
case $interpreter in /usr*) ;; *) place "$interpreter" "$interpreter" ro ;; esac
place "$folder/venv" /opt/venv
place "$folder/medgen" /opt/medgen ro
place "$folder/tmp" /tmp
place "$folder/data" /data
place "$folder/outputs" /outputs

# RUN install.sh
if [ ! -x "$folder/venv/bin/torchrun" ]; then
    place "$here" /build ro
    find "$folder/venv" -mindepth 1 -delete
    PYTHON=$python HOME=/tmp chroot "$root" /build/install.sh /build/requirements.lock /opt/venv /opt/medgen
    umount "$root/build"
    find "$folder/tmp" -mindepth 1 -delete
fi
mount -o remount,bind,ro "$root/opt/venv"
mount -o remount,ro "$root"

# ENV
mapfile -t settings < <("$python" "$here/image.py" env)

in_image() { # in_image FOLDER COMMAND...
    printf '\n$ %s\n' "${*:2}"
    chroot "$root" setpriv --reuid "$uid" --regid 0 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all \
        env -i "${settings[@]}" OMP_NUM_THREADS=1 env --chdir "$1" "${@:2}"
}
in_image / bash -c 'id -u; if touch /opt/medgen/src/written 2>/dev/null || touch /written 2>/dev/null; then exit 1; fi'
in_image / medgen phantom chest /tmp/phantoms --patients 60 --size 256 --seed 1
in_image / python -m preprocessing.images --source /tmp/phantoms/images --target /data/mimic_cxr --size 64
mount -o remount,bind,ro "$root/data"
bundle=/opt/medgen/bundles/cxr_autoencoder_kl args=/opt/medgen/cluster/args/cxr_autoencoder_kl
train=(--args_file "$args.train.json" --batch_size 2 --max_epochs 20 --adversarial_start_epoch 15
    --config_file "['configs/train.json','configs/multi_gpu_train.json','configs/demo.json']")
in_image "$bundle" torchrun --standalone --nproc-per-node 2 -m monai.bundle run "${train[@]}"
in_image "$bundle" python -m monai.bundle run --args_file "$args.evaluate.json" \
    --config_file "['configs/evaluate.json','configs/demo.json']"
results=/outputs/cxr_autoencoder_kl
in_image / medgen registry register "$bundle" --name demo --weights $results/train/model.pt --overlay "$bundle/configs/demo.json" \
    --metrics $results/evaluate/metrics.json --training $results/train --tracking_uri sqlite:///$results/train/mlflow.db
changed=$(find "$folder/medgen" -newer "$folder/data/mimic_cxr/datalist.json" -print -quit)
if [ -n "$changed" ]; then
    echo "the demo wrote into the source tree: $changed" >&2
    exit 1
fi
printf '\nThe demo ran as UID %s on a read-only root. Delete %s when you are done.\n' "$uid" "$folder"
