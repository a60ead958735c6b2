#!/usr/bin/env bash
# tools/venv.sh DIR: makes a virtual environment with torch, this package (editable) and everything to develop it.
# Environment: PYTHON (default python3), TORCH_INDEX_URL (where to take torch from; default: chosen below).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: tools/venv.sh DIR}
python=${PYTHON:-python3}
cpu_index=https://download.pytorch.org/whl/cpu

say() { printf '==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

create() {
    command -v "$python" >/dev/null || fail "$python was not found; install Python >= 3.10, or say PYTHON=/path/to/python"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
        || fail "Python >= 3.10 is needed, but $python is $("$python" --version 2>&1); say PYTHON=/path/to/a/newer/python"
    "$python" -c 'import venv, ensurepip' 2>/dev/null \
        || fail "$python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"
    say "Creating $venv with $("$python" --version)"
    "$python" -m venv "$venv"
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

has_torch() { "$venv/bin/python" -c 'import torch; assert torch.__version__ >= torch.torch_version.TorchVersion("2.10")' 2>/dev/null; }
has_nvidia() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }
has_amd() { command -v rocminfo >/dev/null && rocminfo 2>/dev/null | grep -q gfx; }

# On Linux, torch from the default index is a CUDA build of several gigabytes: right with an NVIDIA GPU, else a waste.
install_torch() {
    has_torch && return
    if [[ -n ${TORCH_INDEX_URL:-} ]]; then
        say "Installing torch from $TORCH_INDEX_URL"
        pip install "torch>=2.10" --index-url "$TORCH_INDEX_URL"
    elif [[ $(uname -s) != Linux ]] || has_nvidia; then
        say "Installing torch"
        pip install "torch>=2.10"
    else
        has_amd && say "AMD GPU: for torch's ROCm build, remove $venv and give its index as TORCH_INDEX_URL (see pytorch.org)"
        say "Installing torch, CPU build"
        # First from wherever pip is configured to look, then from PyTorch's own index.
        pip install --quiet "torch==2.13.0+cpu" 2>/dev/null && return
        pip --retries 1 --timeout 20 install "torch>=2.10" --index-url "$cpu_index" && return
        say "$cpu_index could not be used; installing the default torch, which may take gigabytes"
        pip install "torch>=2.10"
    fi
}

create
install_torch
say "Installing grade-kernels and its tools (a minute or two)"
# Without isolation the build runs on these, and so can `setup.py build_ext` later.
pip install --quiet "setuptools>=77" ninja
pip install --quiet --no-build-isolation --editable ".[dev]"
