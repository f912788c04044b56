#!/usr/bin/env bash
# Installs missing packages, checks the configuration and trains: ./train.sh [CONFIG] [key=value ...]
#
#   CONFIG                      the same as CONFIG_PATH; mine means ENV=mine if there is a folder config/mine
#   CONFIG_PATH                 configuration file (config/config.json); ".json" may be left out
#   ENV                         uses config/<ENV>/config.json and config/<ENV>/config.env
#   VENV_PATH                   virtual environment, created if missing (the active one, else .venv)
#   TRAINING_NUM_PROCESSES      processes on all machines together (1)
#   TRAINING_NUM_MACHINES       machines (1); several need --main_process_ip, --main_process_port and
#                               --machine_rank in ACCELERATE_EXTRA_ARGS
#   MIXED_PRECISION             overrides mixed_precision of the configuration
#   TRAINING_DYNAMO_BACKEND     overrides dynamo_backend of the configuration
#   ACCELERATE_CONFIG_PATH      accelerate's yaml file; it sets processes and machines
#   ACCELERATE_EXTRA_ARGS       further arguments of `accelerate launch`
#
# config/config.env and config/<ENV>/config.env may set the same names (shell assignments); the second file
# overrides the first, and the environment of this command overrides both.
# Exit codes: 0 done, 1 failure, 2 bad configuration, 3 nothing to resume, 75 stopped and resumable.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1
case "${1:-}" in
-h | --help)
    sed -n '2,/^set -u/s/^# \{0,1\}//p' train.sh
    exit 0
    ;;
esac
. tools/environment.sh

settings="ENV CONFIG_BACKEND CONFIG_PATH VENV_PATH TRAINING_NUM_PROCESSES TRAINING_NUM_MACHINES MIXED_PRECISION
    TRAINING_DYNAMO_BACKEND ACCELERATE_EXTRA_ARGS ACCELERATE_CONFIG_PATH"

# read_settings FILE: exports the file's assignments; the caller's environment overrides them.
read_settings() {
    [ -f "$1" ] || return 0
    set -a +u
    # shellcheck disable=SC1090
    . "$1" || fail 2 "$1 could not be read as shell assignments."
    set +a -u
    eval "$callers_settings"
}

case "${1:-}" in
'' | -* | *=*) ;;
*)
    [ -z "${CONFIG_PATH:-}" ] || fail 2 "Two configurations are given: $1 and CONFIG_PATH=$CONFIG_PATH. Keep one."
    if [ -d "config/$1" ]; then ENV=$1; else CONFIG_PATH=$1; fi
    shift
    ;;
esac

callers_settings=
for name in $settings; do
    if [ -n "${!name+set}" ]; then
        callers_settings="$callers_settings export $name=$(printf '%q' "${!name}");"
    fi
done
read_settings config/config.env
[ -z "${ENV:-}" ] || [ "$ENV" = default ] || read_settings "config/$ENV/config.env"

find_config() {
    [ "${CONFIG_BACKEND:-json}" = json ] ||
        fail 2 "CONFIG_BACKEND=$CONFIG_BACKEND is not supported; write the configuration as json and leave CONFIG_BACKEND out."
    if [ -n "${CONFIG_PATH:-}" ]; then
        config=$CONFIG_PATH
    elif [ -n "${ENV:-}" ] && [ "$ENV" != default ]; then
        [ -d "config/$ENV" ] || fail 2 "ENV=$ENV, but there is no folder config/$ENV."
        config=config/$ENV/config.json
    else
        config=config/config.json
    fi
    if [ ! -f "$config" ] && [ -f "$config.json" ]; then
        config=$config.json
    fi
}

is_positive_number() {
    case $1 in
    '' | *[!0-9]* | 0*) return 1 ;;
    esac
}

choose_launch() {
    processes=${TRAINING_NUM_PROCESSES:-1}
    machines=${TRAINING_NUM_MACHINES:-1}
    is_positive_number "$processes" || fail 2 "TRAINING_NUM_PROCESSES=$processes is not a number from 1 up."
    is_positive_number "$machines" || fail 2 "TRAINING_NUM_MACHINES=$machines is not a number from 1 up."
    if [ $((processes % machines)) -ne 0 ]; then
        fail 2 "TRAINING_NUM_PROCESSES=$processes counts all machines and must be a multiple of TRAINING_NUM_MACHINES=$machines."
    fi
    if [ -n "${ACCELERATE_CONFIG_PATH:-}" ]; then
        [ -f "$ACCELERATE_CONFIG_PATH" ] || fail 2 "ACCELERATE_CONFIG_PATH=$ACCELERATE_CONFIG_PATH is not a file."
    fi
}

# Sets launcher_args, the arguments of accelerate launch.
choose_launcher_args() {
    launcher_args=()
    if [ -n "${ACCELERATE_CONFIG_PATH:-}" ]; then
        launcher_args+=(--config_file "$ACCELERATE_CONFIG_PATH")
    else
        local devices per_machine=$((processes / machines))
        devices=$("$python" -c 'import torch; print(torch.cuda.device_count())') ||
            fail 1 "torch could not be imported from $environment; its message is above."
        if [ "$devices" -eq 0 ]; then
            # accelerate's --cpu always starts one process; this variable starts all of them on the CPU.
            export ACCELERATE_USE_CPU=true
        elif [ "$devices" -lt "$per_machine" ]; then
            fail 2 "$per_machine processes on this machine, but it has $devices GPUs. Set TRAINING_NUM_PROCESSES to at most $((devices * machines))."
        fi
        [ "$processes" -eq 1 ] || launcher_args+=(--multi_gpu)
        launcher_args+=(--num_processes "$processes" --num_machines "$machines")
        [ "$machines" -gt 1 ] || launcher_args+=(--main_process_port 0)
        launcher_args+=(--dynamo_backend no)
        launcher_args+=(--mixed_precision "${MIXED_PRECISION:-no}")
        if [ -z "${OMP_NUM_THREADS:-}" ]; then
            local cores
            cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
            export OMP_NUM_THREADS=$((cores > per_machine ? cores / per_machine : 1))
        fi
    fi
    # Word splitting is intended.
    # shellcheck disable=SC2206
    launcher_args+=(${ACCELERATE_EXTRA_ARGS:-})
}

# Runs the workers in their own process group, forwards signals to them and exits with the code that the first
# worker wrote: accelerate's launcher forwards signals too late and turns every code but 0 into 1.
launch_several() {
    SIMPLETUNER_LAUNCH_DIR=$(mktemp -d "${TMPDIR:-/tmp}/simpletuner.XXXXXX") || fail 1 "No temporary folder could be made."
    export SIMPLETUNER_LAUNCH_DIR
    trap 'rm -rf "$SIMPLETUNER_LAUNCH_DIR"' EXIT
    launcher=
    trap 'forward TERM' TERM
    trap 'forward INT' INT
    trap 'forward USR1' USR1
    trap 'forward HUP' HUP
    set -m
    "$python" -m accelerate.commands.launch "${launcher_args[@]}" -m simpletuner.train "$@" &
    launcher=$!
    set +m
    local code=0 latest
    while :; do
        interrupted=
        wait "$launcher" 2>/dev/null
        latest=$?
        [ "$latest" -ne 127 ] || break
        code=$latest
        [ -n "$interrupted" ] || break
    done
    exit "$(real_exit_code "$code")"
}

real_exit_code() { # real_exit_code LAUNCHER_CODE
    local written=
    [ ! -f "$SIMPLETUNER_LAUNCH_DIR/exit_code" ] || written=$(cat "$SIMPLETUNER_LAUNCH_DIR/exit_code")
    if [ "$1" -eq 0 ]; then
        echo "${written:-1}"
    elif [ -z "$written" ] && [ -e "$SIMPLETUNER_LAUNCH_DIR/signalled" ]; then
        echo 75 # before training began: the same command starts the run
    elif [ -z "$written" ] || [ "$written" -eq 0 ]; then
        echo 1 # another process failed
    else
        echo "$written"
    fi
}

forward() { # forward SIGNAL: to the workers, by the process ids they wrote; before that there is nothing to save
    local record workers=0
    interrupted=yes
    : >"$SIMPLETUNER_LAUNCH_DIR/signalled"
    for record in "$SIMPLETUNER_LAUNCH_DIR"/*.pid; do
        [ -e "$record" ] || continue
        record=${record##*/}
        kill -s "$1" "${record%.pid}" 2>/dev/null && workers=$((workers + 1))
    done
    [ "$workers" -gt 0 ] || [ -z "$launcher" ] || kill -s TERM "$launcher" 2>/dev/null
}

find_config
choose_launch
choose_environment
install_project

# Before training begins a stop loses nothing. Under nohup no trap on HUP takes effect.
trap 'echo "train.sh: Stopped by a signal before training began. The same command starts the run." >&2; exit 75' \
    TERM INT USR1 HUP

# The environment variable overrides the file, and an argument overrides the variable.
[ -z "${TRAINING_DYNAMO_BACKEND:-}" ] || set -- "dynamo_backend=$TRAINING_DYNAMO_BACKEND" "$@"
[ -z "${MIXED_PRECISION:-}" ] || set -- "mixed_precision=$MIXED_PRECISION" "$@"
"$python" -m simpletuner validate --config "$config" "$@" || exit $?

# GNU's OpenMP threads spin while they wait, which slows every other program on the machine.
[ -n "${OMP_WAIT_POLICY:-}" ] || export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-0}"

if [ "$processes" -eq 1 ] && [ -z "${ACCELERATE_CONFIG_PATH:-}${ACCELERATE_EXTRA_ARGS:-}" ]; then
    [ -z "${MIXED_PRECISION:-}" ] || export ACCELERATE_MIXED_PRECISION="$MIXED_PRECISION"
    exec "$python" -m simpletuner.train --config "$config" "$@"
fi
choose_launcher_args
launch_several --config "$config" "$@"
