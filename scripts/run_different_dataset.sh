#!/usr/bin/env bash
# Setting 2: CIFAR-10 against six OOD sets, both modes, in one evaluation.
#   DEVICE=cuda SEEDS=3 DATA_DIR=datasets bash scripts/run_different_dataset.sh [further options of reproduce]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/run_task.sh"
run_task different_dataset "$@"
