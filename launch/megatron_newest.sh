#!/usr/bin/env bash
# The tests of Megatron-Core in their long form on Python 3.12, with the newest version that constraints-3.12.txt pins, in an environment of
# its own that is made when it is not there. Arguments go to pytest, in place of tests/megatron.
#   PIKV_MEGATRON_NEWEST  where the environment lies (default: .venv-megatron-newest)
#   PYTHON312             the interpreter that makes it (default: python3.12, or pyenv's)
# tests/megatron/test_newest.py runs one static-batching job in that environment from then on, whatever Python runs the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

is_312() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1
}

pick_312() {
    local candidate
    for candidate in ${PYTHON312:-python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python}; do
        if is_312 "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "pikv: found no Python 3.12, which Megatron-Core asks for from 0.17 on; set PYTHON312 to one" >&2
    return 1
}

VIRTUAL_ENV=${PIKV_MEGATRON_NEWEST:-$PWD/.venv-megatron-newest}
if ! is_312 "$VIRTUAL_ENV/bin/python"; then
    interpreter=$(pick_312)
    echo "pikv: making $VIRTUAL_ENV with $interpreter"
    "$interpreter" -m venv "$VIRTUAL_ENV"
fi
export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH"
unset PYTHONHOME PIKV_NO_INSTALL
source launch/env.sh
export TORCH_EXTENSIONS_DIR=$VIRTUAL_ENV/extensions PIKV_TEST_LONG=1
echo "pikv: $(python -c 'import sys, megatron.core; print("Python", sys.version.split()[0], "megatron-core", megatron.core.__version__)' 2>/dev/null)"
pikv build cpu
if (($# == 0)); then
    set -- tests/megatron
fi
exec python -m pytest -n "${PIKV_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
