#!/usr/bin/env bash
# Run the tests. Arguments go to pytest, for example: bash launch/test.sh tests/unit -k config
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python -m pytest "$@"
