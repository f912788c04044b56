#!/usr/bin/env bash
# The one test command: installs what is missing, then style, types, spelling and the tests.
#   tests/run.sh [pytest arguments], for instance tests/run.sh tests/unit -k rank
# VENV_PATH, the active environment or .venv, like train.sh. TEST_WORKERS sets the number of test processes (2).
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
. tools/environment.sh
choose_environment
install_project dev

# One thread each: results are compared to the last digit, and a busy machine makes OpenMP threads wait in a spin.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Every test process and every command that a test starts would compile the package and the tests anew.
unset PYTHONDONTWRITEBYTECODE
bin=$environment/bin
failed=
check() { # check NAME COMMAND...
    local name=$1
    shift
    printf '== %s\n' "$name"
    "$@" || failed="$failed $name;"
}
check "ruff check" "$bin/ruff" check .
check "ruff format" "$bin/ruff" format --check .
check "mypy" "$bin/mypy"
check "codespell" "$bin/codespell"
[ -z "$failed" ] || printf 'Failed before the tests:%s see above.\n' "$failed" >&2

printf '== pytest\n'
# A file's tests run in one process, so what they share is made once; the long ones, in integration, start first.
"$bin/python" -m pytest --numprocesses "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
code=$?
[ -z "$failed" ] || [ "$code" -ne 0 ] || code=1
exit "$code"
