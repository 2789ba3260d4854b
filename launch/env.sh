# shellcheck shell=bash
# Sourced by demo.sh, test.sh and dev.sh: enters the repository, prepares a Python environment and installs the package into it.
#   PYTHON            interpreter that makes .venv when no environment is active (default: the first of python3, 3.12, 3.11 that is >= 3.11)
#   PIKV_NO_INSTALL   1: the environment is taken as it is, nothing is installed

cd "$(dirname "${BASH_SOURCE[0]}")/.." || return

have_version() { # have_version INTERPRETER: is it there, and new enough?
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

pick_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
        if have_version "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "pikv: found no Python >= 3.11 (tried ${PYTHON:-python3 python3.12 python3.11}); set PYTHON to one" >&2
    return 1
}

if [[ -z "${VIRTUAL_ENV:-}" && -z "${CONDA_PREFIX:-}" ]]; then
    if [[ ! -x .venv/bin/python ]]; then
        interpreter=$(pick_python)
        echo "pikv: making .venv with $interpreter"
        "$interpreter" -m venv .venv
    fi
    VIRTUAL_ENV=$PWD/.venv
    PATH=$VIRTUAL_ENV/bin:$PATH
    export VIRTUAL_ENV PATH
    unset PYTHONHOME
fi
if ! have_version python; then
    echo "pikv: the active environment (${VIRTUAL_ENV:-$CONDA_PREFIX}) has no Python >= 3.11; deactivate it to let .venv be made" >&2
    exit 1
fi

installed_torch() { # the version of a torch that is there and new enough, or nothing
    python - <<'PY'
from importlib.metadata import PackageNotFoundError, version
try:
    found = version("torch").partition("+")[0]
except PackageNotFoundError:
    found = ""
print(found if found and tuple(map(int, found.split(".")[:2])) >= (2, 11) else "")
PY
}

# Without an NVIDIA driver the default Linux wheel of torch brings gigabytes of CUDA libraries for nothing.
torch_index() {
    local index=https://download.pytorch.org/whl/cpu
    if [[ "$(uname -s)" != Linux || -e /proc/driver/nvidia/version || -e /dev/nvidiactl || -e /dev/dxg ]]; then
        return
    fi
    if python -c "import urllib.request; urllib.request.urlopen('$index/torch/', timeout=10)" 2>/dev/null; then
        echo "--extra-index-url $index"
    else
        echo "pikv: no NVIDIA driver here, but $index cannot be reached; pip chooses the torch build" >&2
    fi
}

constraints_file() { # the exact versions for the active Python
    python -c 'import sys; print("constraints.txt" if sys.version_info < (3, 12) else "constraints-3.12.txt")'
}

install() {
    local torch pinned constraints
    pinned=$(constraints_file)
    constraints=$pinned
    local pip=(python -m pip install --quiet --disable-pip-version-check)
    torch=$(installed_torch)
    if [[ -n "$torch" ]]; then
        # It stays: another build may not fit the driver.
        constraints=$(mktemp)
        sed "s/^torch==.*/torch==$torch/" "$pinned" >"$constraints"
    else
        # shellcheck disable=SC2046
        "${pip[@]}" -c "$constraints" $(torch_index) torch
    fi
    # DeepSpeed's setup.py looks at the torch that is installed, hence no build isolation: setuptools must be here.
    "${pip[@]}" -c "$constraints" 'setuptools>=77'
    "${pip[@]}" --no-build-isolation -c "$constraints" -e '.[test]'
    if [[ "$constraints" != "$pinned" ]]; then
        rm -f "$constraints"
    fi
}

install_if_changed() { # since the last time, in this environment: the requirements, or where the repository lies
    local stamp wanted
    stamp=$(python -c 'import sys; print(sys.prefix)')/.pikv-installed
    wanted=$(cat setup.py "$(constraints_file)" <(pwd) | python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    if [[ ! -f "$stamp" || "$(cat "$stamp")" != "$wanted" ]]; then
        echo "pikv: installing into $(dirname "$stamp") (a few minutes the first time)"
        install
        echo "$wanted" >"$stamp"
    fi
}

if [[ "${PIKV_NO_INSTALL:-}" != 1 ]]; then
    install_if_changed
fi

if [[ -z "${DS_ACCELERATOR:-}" ]] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    export DS_ACCELERATOR=cpu
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=false
