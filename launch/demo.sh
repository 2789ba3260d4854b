#!/usr/bin/env bash
# Generate text with the bundled model on two ranks, its KV cache sharded over them. Arguments go to `pikv demo`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec pikv demo "$@"
