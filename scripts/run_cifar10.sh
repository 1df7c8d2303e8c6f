#!/usr/bin/env bash
# Setting 1 on CIFAR-10: five partitions, both modes, and the means over the partitions.
#   DEVICE=cuda SEED=123 DATA_DIR=datasets bash scripts/run_cifar10.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/run_partitions.sh"
run_task same_dataset_cifar10 partition1 partition2 partition3 partition4 partition5
