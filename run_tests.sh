#!/usr/bin/env bash
# All tests on all cores (at most 8), in the same environment as run_all.sh. Arguments go to pytest:
# bash run_tests.sh -k listops
set -euo pipefail
cd "$(dirname "$0")"
source lra/environment.sh
exec "$PY" -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
