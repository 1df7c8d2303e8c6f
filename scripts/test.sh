#!/usr/bin/env bash
# The whole test suite, lint and format.
#   bash scripts/test.sh [pytest arguments]
set -euo pipefail
requirements=requirements-dev.txt
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m pytest "$@"
