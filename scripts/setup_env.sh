# Makes .venv, or takes the one that is there, and installs the pinned versions into it: bash scripts/setup_env.sh
# The other shell scripts source it, for the interpreter in $PYTHON and the checkout in $ROOT.
# On Linux without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes of CUDA libraries.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV="$ROOT/.venv"
PYTHON="$VENV/bin/python"

die() { echo "error: $*" >&2; exit 1; }

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if is_recent "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer on PATH (python3 is: $(python3 --version 2>&1 | head -n 1))"
}

# Where the standard library lacks ensurepip (Debian packages it apart), the machine's own pip installs into .venv.
pip_install() {
    if "$PYTHON" -m pip --version >/dev/null 2>&1; then
        "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"
    else
        "$(find_python)" -m pip --python "$PYTHON" install --quiet --disable-pip-version-check "$@"
    fi
}

setup_env() {
    local python stamp wanted
    if [ ! -e "$VENV" ]; then
        python=$(find_python) || exit 1
        echo "Creating $VENV with $("$python" --version)"
        "$python" -m venv "$VENV" >/dev/null 2>&1 || "$python" -m venv --clear --without-pip "$VENV" \
            || die "$python cannot create a virtual environment"
    fi
    is_recent "$PYTHON" || die "$VENV holds no working Python 3.11 or newer: remove that folder and run this again"

    # The place is part of the stamp: an editable install points at the checkout it was made in.
    stamp="$VENV/.installed"
    wanted="$ROOT $(cat "$ROOT/constraints.txt" "$ROOT/pyproject.toml" | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "Installing the pinned versions into $VENV (takes minutes the first time)"
        pip_install "$(grep '^torch==' "$ROOT/constraints.txt")" || die "pip could not install torch"
        pip_install -c "$ROOT/constraints.txt" -e "$ROOT[test]" || die "pip could not install the pinned versions"
        echo "$wanted" >"$stamp"
    fi
}

setup_env
