#!/usr/bin/env bash
# The whole test suite, lint and format.
#   bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m pytest "$@"
