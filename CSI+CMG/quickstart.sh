#!/usr/bin/env bash
# The whole CSI+CMG chain on the digits that ship with scikit-learn: minutes on two CPU cores, no download.
#   bash "CSI+CMG/quickstart.sh"
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/setup.sh"
# Few images make few steps: smaller batches and larger rates than the paper's make up for it.
"$python" -m train --task same_dataset_digits_rgb --command train_cvae --epochs 40 --device cpu
cd CSI+CMG
"$python" -m train --mode sup_simclr_CSI --dataset digits --width 8 --epochs 30 --warmup 2 --batch_size 32 --lr 3 --device cpu
"$python" -m train --mode sup_CSI_linear --dataset digits --epochs 20 --batch_size 32 --device cpu
"$python" -m eval --mode all --dataset digits --device cpu
"$python" -m main --dataset digits --device cpu
