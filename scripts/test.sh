#!/usr/bin/env bash
# Lint, format and the whole test suite, in two processes of one thread each.
#   bash scripts/test.sh [pytest arguments]
set -euo pipefail
requirements=requirements-dev.txt
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m pytest -n 2 --dist worksteal "$@"
