#!/usr/bin/env bash
# Setting 2: CIFAR-10 against six OOD sets, both modes, in one evaluation.
#   DEVICE=cuda SEED=123 DATA_DIR=datasets bash scripts/run_different_dataset.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/run_partitions.sh"
run_task different_dataset all
