#!/usr/bin/env bash
# What a developer runs, by name. `bash launch/dev.sh --help` lists it; further arguments go to the tool behind the command.
set -euo pipefail

# One line a command: its name, and what is printed of it. The function run_NAME below does it.
COMMANDS=(
    "lint|ruff check, ruff format --check, bash -n and shellcheck: the whole repository"
    "types|mypy on the files that pyproject.toml names"
    "quick|lint, then the unit, contract and packaging tests without slow ones and process groups"
    "full|every test, the short form (bash launch/test.sh)"
    "docs|make the generated documents anew and say which of them were not up to date"
    "bench|time a decode step against its stored baseline (python -m tests.gate)"
    "megatron-newest|the tests of Megatron-Core on Python 3.12 with the newest version, in an environment of their own; minutes to make"
    "hosts|run lowest, pinned and newest of each host in environments of their own (python -m tests.hosts); hours, needs the package index"
    "hooks|check staged files at every commit of this clone (git config core.hooksPath .ci/hooks)"
)

# Generated documents, one line each: what is written, and the command that writes it.
DOCUMENTS=(
    "docs/results/methods.md docs/results/*.png|pikv methods --doc docs/results/methods.md"
    "docs/reference/*.md docs/figures/*.svg|python -m tests.docs"
)

# Top-level folders that are part of the package pikv_ds once it is installed (GRAFTS in setup.py).
GRAFTS=(ops megatron_patch launch)

usage() {
    local line
    echo "usage: bash launch/dev.sh COMMAND [ARGUMENT ...]"
    for line in "${COMMANDS[@]}"; do
        printf '  %-15s %s\n' "${line%%|*}" "${line#*|}"
    done
}

run_lint() {
    local scripts=(launch/*.sh .ci/run .ci/hooks/*) script
    python -m ruff check .
    python -m ruff format --check .
    for script in "${scripts[@]}"; do
        bash -n "$script"
    done
    if command -v shellcheck >/dev/null; then
        shellcheck --severity=warning --external-sources --source-path=SCRIPTDIR "${scripts[@]}"
    else
        echo "pikv: shellcheck is not installed; the scripts were parsed only"
    fi
    if [[ "$(git config core.hooksPath 2>/dev/null)" != .ci/hooks ]]; then
        echo "pikv: 'bash launch/dev.sh hooks' runs ruff on what a commit stages"
    fi
}

# mypy reads files and knows nothing of the path that pikv_ds/__init__.py extends in a checkout. It gets a folder of links that is laid
# out as the wheel is, always the same one, so that its cache stays valid.
run_types() {
    local view=$PWD/.mypy_cache/view root=$PWD graft
    rm -rf "$view"
    mkdir -p "$view/pikv_ds"
    ln -s "$root"/pikv_ds/* "$view/pikv_ds/"
    for graft in "${GRAFTS[@]}"; do
        ln -s "$root/$graft" "$view/pikv_ds/$graft"
    done
    cd "$view"
    MYPYPATH=$view python -m mypy --config-file "$root/pyproject.toml" --cache-dir "$root/.mypy_cache" "$@"
}

run_quick() {
    run_lint
    python -m pytest -n "${PIKV_TEST_WORKERS:-2}" --dist loadfile -q -m "not slow and not dist" \
        tests/{ground,config,exchange,placement,codecs,pages,routers,policies,selection,retention,tiers,cache,blueprint,contracts,packaging} "$@"
}

run_full() {
    bash launch/test.sh "$@"
}

run_docs() {
    local line files command before stale=()
    for line in "${DOCUMENTS[@]}"; do
        files=${line%%|*} command=${line#*|}
        echo "pikv: $command"
        before=$(checksums "$files")
        bash -c "$command"
        if [[ "$(checksums "$files")" != "$before" ]]; then
            stale+=("$files")
        fi
    done
    if ((${#stale[@]})); then
        printf 'pikv: was not up to date: %s\n' "${stale[@]}"
        echo "pikv: read the difference and commit it"
        return 1
    fi
    echo "pikv: all generated documents were up to date"
}

checksums() { # checksums "FILE PATTERN ...": of the files that are there
    python - "$1" <<'PY'
import hashlib, pathlib, sys
for pattern in sys.argv[1].split():
    for file in sorted(pathlib.Path().glob(pattern)):
        print(file, hashlib.sha256(file.read_bytes()).hexdigest())
PY
}

run_bench() {
    python -m tests.gate "$@"
}

run_megatron-newest() {
    bash launch/megatron_newest.sh "$@"
}

run_hosts() {
    python -m tests.hosts "$@"
}

run_hooks() {
    git config core.hooksPath .ci/hooks
    echo "pikv: on; 'git config --unset core.hooksPath' turns it off, 'git commit --no-verify' passes it once"
}

case "${1:-}" in
    -h | --help)
        usage
        exit
        ;;
esac
for line in "${COMMANDS[@]}"; do
    if [[ "${line%%|*}" == "${1:-}" ]]; then
        source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
        echo "pikv: $1: ${line#*|}"
        "run_$1" "${@:2}"
        exit
    fi
done
echo "pikv: ${1:+unknown command '$1'; }name one of these" >&2
usage >&2
exit 2
