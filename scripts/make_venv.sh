#!/usr/bin/env bash
# Makes a virtual environment and installs requirement files into it, held to constraints.txt.
#
#   bash scripts/make_venv.sh VENV REQUIREMENTS_FILE...      (paths from the repository's root)
#
# PYTHON       the interpreter to build on (default: the first of python3.13, 3.12, 3.11, python3
#              and python that is a Python 3.11 to 3.13 and really starts)
# TORCH_INDEX  address of another package index for torch alone, e.g. of its CPU build
set -euo pipefail

if (($# < 2)); then
    echo "usage: bash scripts/make_venv.sh VENV REQUIREMENTS_FILE..." >&2
    exit 2
fi
venv=$1
shift
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# A name on PATH proves little: version managers install stand-ins that only print an error.
is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
        >/dev/null 2>&1
}

can_make_venv() {
    "$1" -c 'import ensurepip, venv' >/dev/null 2>&1
}

find_python() {
    local candidate without_venv=""
    if [[ -n ${PYTHON:-} ]]; then
        if ! is_supported "$PYTHON"; then
            echo "error: PYTHON=$PYTHON is not a working Python 3.11, 3.12 or 3.13." >&2
            return 1
        fi
        set -- "$PYTHON"
    else
        set -- python3.13 python3.12 python3.11 python3 python
    fi
    for candidate in "$@"; do
        is_supported "$candidate" || continue
        if can_make_venv "$candidate"; then
            echo "$candidate"
            return 0
        fi
        without_venv=${without_venv:-$candidate}
    done
    if [[ -n $without_venv ]]; then
        echo "error: $without_venv has no venv module; install it (on Debian and Ubuntu the" >&2
        echo "package python3-venv) or name another interpreter: make PYTHON=/path/to/python" >&2
    else
        echo "error: no working Python 3.11, 3.12 or 3.13 found on PATH; install one or name it:" >&2
        echo "make PYTHON=/path/to/python3.12" >&2
    fi
    return 1
}

# Also when an earlier run was interrupted between python and pip.
if ! is_supported "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "making $venv with $python ($("$python" --version))"
    "$python" -m venv --clear "$venv"
fi

pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)
if [[ -n ${TORCH_INDEX:-} && ${TORCH_INDEX} != "$(cat "$venv/.torch-index" 2>/dev/null)" ]]; then
    # --no-deps: such an index holds torch's own dependencies in few versions, ours come below.
    # --force-reinstall: another build of the same version counts as installed otherwise.
    "${pip[@]}" install --force-reinstall --no-deps --index-url "$TORCH_INDEX" \
        -c constraints.txt torch
    echo "$TORCH_INDEX" >"$venv/.torch-index"
fi
requirements=()
for file in "$@"; do
    requirements+=(-r "$file")
done
"${pip[@]}" install -c constraints.txt "${requirements[@]}"
