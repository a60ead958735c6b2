#!/usr/bin/env bash
# tools/tritons.sh [--quick] [VERSION...]: runs what decides about the Triton kernels with other versions of Triton than the
# environment's. Without a version: with every one that a supported torch brings.
#
# Each is installed into .tritons/VERSION (some 700 MB). Then the tests run in its interpreter, and `grade-kernels inspect`
# compiles all kernels for GPUs; docs/gpu-status/compiled-triton-VERSION.json says what came of it.
# --quick, for .ci/run: the kernels that registers are scarcest in, and no file.
# Environment: PYTHON (default .venv/bin/python), with this package and its tools.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
# torch 2.10 and 2.11 bring 3.6, 2.12 brings 3.7, 2.14 brings 3.8.
all=(3.6.0 3.7.1 3.8.0 3.9.0)

say() { printf '==> %s\n' "$*"; }

install() { # into a folder that Python finds before the environment's
    [[ -d .tritons/$1/triton ]] && return
    say "Installing Triton $1 into .tritons/$1"
    rm -rf ".tritons/$1.partial"
    "$python" -m pip --disable-pip-version-check install --quiet --no-deps --target ".tritons/$1.partial" "triton==$1"
    mv ".tritons/$1.partial" ".tritons/$1"
}

check() {
    export PYTHONPATH="$PWD/.tritons/$1:$PWD"
    local found
    found=$("$python" -c 'import triton; print(triton.__version__)')
    [[ $found == "$1" ]] || { echo "error: Python finds Triton $found, not $1" >&2; return 1; }
    say "Triton $1: tests in the interpreter"
    "$python" -m pytest -q -n logical --dist worksteal tests/backends/triton tests/backends/test_row_kernels.py \
        tests/backends/test_row_layouts.py tests/inspection/test_traffic.py tests/ops \
        -k "triton and not (torch-cpu or cpu-cpu or reference-cpu)"
    say "Triton $1: kernels compiled for GPUs"
    if $quick; then
        "$python" -m grade_kernels.cli inspect --target sm_80 sm_90 sm_120 gfx942 --kernel \
            "head scores bf16 128*" "head softmax, ref bf16 128*" "sample+lse fp64 *"
    else
        mkdir -p docs/gpu-status
        "$python" -m grade_kernels.cli inspect --status "docs/gpu-status/compiled-triton-$1.json"
    fi
}

quick=false
if [[ ${1:-} == --quick ]]; then
    quick=true
    shift
fi
failed=()
for version in "${@:-${all[@]}}"; do
    install "$version"
    (check "$version") || failed+=("$version")
done
if ((${#failed[@]})); then
    echo "error: not as it should be with Triton ${failed[*]}" >&2
    exit 1
fi
