#!/usr/bin/env bash
# The whole CSI+CMG chain on the embedded digits, in a few minutes on two CPU cores; no download.
#   bash "CSI+CMG/quickstart.sh"
# takes $PYTHON, or else the repository's .venv; checkpoints go to ckpt/, figures to results/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python="${PYTHON:-$PWD/../.venv/bin/python}"
if ! command -v "$python" > /dev/null; then
    echo "quickstart: error: $python not found; make .venv in the repository's root with requirements.txt, or set PYTHON" >&2
    exit 2
fi
run() { echo "+ python $*"; "$python" "$@"; }

# Few images make few steps: smaller batches and larger rates than the paper's make up for it.
run -m train --mode sup_simclr_CSI --dataset digits --width 8 --epochs 30 --warmup 2 --batch_size 32 --lr 3 --device cpu
run -m train --mode sup_CSI_linear --dataset digits --epochs 20 --batch_size 32 --device cpu
run -m eval --mode all --dataset digits --device cpu
(cd .. && run -m train --task same_dataset_digits_rgb --command train_cvae --epochs 40 --device cpu)
run -m main --dataset digits --lr 1e-3 --device cpu
