#!/usr/bin/env bash
# The whole method on the handwritten digits that ship with scikit-learn: a few minutes on a laptop's CPU, no download.
#   bash scripts/quickstart.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
"$python" -m train --command train_classifier
"$python" -m train --command train_cvae
"$python" -m eval
