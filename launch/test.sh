#!/usr/bin/env bash
# Run the tests, one file at a time on each of two workers, files with slow tests first (tests/conftest.py).
# Arguments go to pytest, for example: bash launch/test.sh tests/config -k page
# --long first: also what the short form leaves out (tests/long_form.py)
set -euo pipefail
if [[ "${1:-}" == --long ]]; then
    export PIKV_TEST_LONG=1
    shift
fi
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
echo "pikv: building the ops"
pikv build cpu
exec python -m pytest -n "${PIKV_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
