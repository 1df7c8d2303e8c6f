#!/usr/bin/env bash
# Setting 1 on MNIST: five partitions, both modes, and the means over the partitions.
#   DEVICE=cuda SEEDS=3 DATA_DIR=datasets bash scripts/run_mnist.sh [further options of reproduce]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/run_task.sh"
run_task same_dataset_mnist "$@"
