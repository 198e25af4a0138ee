#!/usr/bin/env bash
# Install the lock file into a virtual environment: install.sh LOCK_FILE VENV SOURCE_TREE
# Where the interpreter has torch already (nvcr.io/nvidia/pytorch), that one is kept, with what belongs to it.
set -euo pipefail
lock=$1 venv=$2 source=$3
python=${PYTHON:-python3}
# NVIDIA's images pin hundreds of packages by this variable, which the lock file does already
unset PIP_CONSTRAINT
options=() wanted=$lock
if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
    options+=(--system-site-packages)
    wanted=$(mktemp)
    awk '/^[A-Za-z0-9]/ { keep = $0 !~ /^((torch|torchvision|triton)==|nvidia-|cuda-)/ } keep' "$lock" >"$wanted"
fi
"$python" -m venv --without-pip "${options[@]}" "$venv"
# nothing but what the lock file names, each file by its hash; pip itself stays outside
"$python" -m pip --python "$venv/bin/python" install --require-hashes --no-deps --only-binary :all: --requirement "$wanted"
# the source tree runs from where it lies, and its commands by the environment's interpreter, torchrun too where torch
# belongs to the base
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "$source/src" "$source" >"$site/medgen.pth"
for command in medgen=medgen.cli:app torchrun=torch.distributed.run:main; do
    name=${command%%=*} target=${command#*=}
    printf '#!%s/bin/python\nimport sys\nfrom %s import %s\nsys.exit(%s())\n' \
        "$venv" "${target%:*}" "${target#*:}" "${target#*:}" >"$venv/bin/$name"
    chmod 755 "$venv/bin/$name"
done
