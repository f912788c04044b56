# Sourced by train.sh and tests/run.sh from the repository's root: which Python runs, and what it has installed.
# shellcheck shell=bash
# Works with bash 3.2, the one that macOS ships.

fail() { # fail CODE MESSAGE...
    local code=$1
    shift
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit "$code"
}

is_supported_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

make_environment() { # make_environment FOLDER: a new virtual environment from the newest Python found
    local candidate
    for candidate in python3.13 python3.12 python3.11 python3.14 python3 python; do
        if command -v "$candidate" >/dev/null 2>&1 && is_supported_python "$candidate"; then
            printf 'Making a virtual environment in %s with %s.\n' "$1" "$("$candidate" --version 2>&1)"
            "$candidate" -m venv "$1" ||
                fail 1 "$candidate could not make a virtual environment in $1. On Debian and Ubuntu: apt install python3-venv."
            return
        fi
    done
    fail 1 "Python 3.11 or newer was not found on PATH. Install it, or set VENV_PATH to an environment that has it."
}

# Sets environment (a folder) and python (its interpreter): VENV_PATH, else the active virtual environment,
# else the active conda environment, else .venv, which is made when it is missing.
choose_environment() {
    if [ -n "${VENV_PATH:-}" ]; then
        environment=$VENV_PATH
    elif [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
        environment=$VIRTUAL_ENV
    elif [ -n "${CONDA_PREFIX:-}" ] && [ -x "$CONDA_PREFIX/bin/python" ]; then
        environment=$CONDA_PREFIX
    else
        environment=.venv
    fi
    [ -x "$environment/bin/python" ] || make_environment "$environment"
    environment=$(cd "$environment" && pwd) || fail 1 "$environment cannot be entered."
    python=$environment/bin/python
    is_supported_python "$python" ||
        fail 1 "$python is $("$python" --version 2>&1), or does not start; 3.11 or newer is needed. Remove $environment or set VENV_PATH to another one."
}

# What an installation depends on: the two files that name the packages, and the folder it is editable in.
fingerprint() {
    "$python" - <<'PY'
import hashlib, os, pathlib
digest = hashlib.sha256(os.getcwd().encode())
for name in ("pyproject.toml", "constraints.txt"):
    digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
PY
}

# install_project [EXTRA]: installs when the fingerprint differs from the one that the last installation left.
install_project() {
    local extra=${1:-}
    local stamp=$environment/.simpletuner-installed${extra:+-$extra}
    local now
    now=$(fingerprint) || fail 1 "pyproject.toml and constraints.txt could not be read in $PWD."
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$now" ]; then
        return
    fi
    printf 'Installing into %s; the first time takes some minutes.\n' "$environment"
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip --upgrade >/dev/null ||
        fail 1 "$environment has no pip. Remove the folder, or install pip into it."
    local quiet=
    [ -t 1 ] || quiet=--quiet
    "$python" -m pip install $quiet --no-input --disable-pip-version-check \
        -e ".${extra:+[$extra]}" -c constraints.txt ||
        fail 1 "The installation into $environment failed; pip's message is above. Run the same command again to retry."
    # The base installation is part of every other one.
    printf '%s\n' "$now" >"$environment/.simpletuner-installed"
    printf '%s\n' "$now" >"$stamp"
}
