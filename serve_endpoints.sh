#!/bin/bash
# Model servers for stage 02 on a cluster: one for each GPU of the job, registered in a folder that the stage reads.
# Submit it as often as you like, before the stage or while it runs; such jobs may start and end while the stage runs:
#
#     mkdir -p logs; ENDPOINTS_DIR=/path/to/endpoints sbatch --array=0-3 serve_endpoints.sh
#     ENDPOINTS_DIR=/path/to/endpoints ROOT=/path/to/root sbatch --gpus-per-node=0 02_captions_processor.sh
#
# The default is Ollama.  SERVER_COMMAND is the command of another server, in which {port}, {model}, {gpu} and {bind} are
# replaced (no shell interprets it):
#
#     MODEL=allenai/Llama-3.1-Tulu-3-8B SERVER_COMMAND='vllm serve {model} --host {bind} --port {port}' …
#     MODEL=tulu3 SERVER_COMMAND='llama-server -m tulu3.gguf --alias {model} --host {bind} --port {port}' …
#
# Each server is registered once it has loaded the model, is started again when it dies, and leaves the folder before it is
# stopped.  Every variable is in docs/stage-02.md.  Exit codes: 0 if it was asked to end, 2 if no server keeps running.
#SBATCH --job-name=serve_endpoints
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.log
set -u

# sbatch runs a copy of this file; SLURM knows the original's path, which it shows with the flags behind it
PROJECT=${CURATION_HOME:-$(dirname "$(readlink -f "$0")")}
if [ -z "${CURATION_HOME:-}" ] && [ ! -f "$PROJECT/slurm_tasks.sh" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    PROJECT=$(scontrol show job "$SLURM_JOB_ID" | sed -nE 's#^ +Command=(.*)/[a-z0-9_]+\.sh( .*)?$#\1#p' | head -n 1)
    PROJECT=$(cd "${SLURM_SUBMIT_DIR:-.}" && cd "${PROJECT:-.}" && pwd)
fi
[ -f "$PROJECT/slurm_tasks.sh" ] || { echo "error: the project is not in '$PROJECT': set CURATION_HOME to its folder" >&2 && exit 2; }
source "$PROJECT/slurm_tasks.sh" || exit 2

need ENDPOINTS_DIR "the folder in which servers register, on a filesystem that all nodes share"
MODEL=${MODEL:-tulu3:fairclip}
OLLAMA=${OLLAMA:-ollama}
API=${API:-auto}
PARALLEL=${PARALLEL:-4} # captions that each Ollama server works on at once
BIND=${BIND:-$([ -n "${SLURM_JOB_ID:-}" ] && echo 0.0.0.0 || echo 127.0.0.1)}
START_TIMEOUT_S=${START_TIMEOUT_S:-600}
LOAD_TIMEOUT_S=${LOAD_TIMEOUT_S:-600}
DRAIN_S=${DRAIN_S:-10} # after a server has left the folder: readers notice within 3 s, and finish their requests
RESTARTS=${RESTARTS:-3}
RESTART_PAUSE_S=${RESTART_PAUSE_S:-10}
SERVER_LOGS=${SERVER_LOGS:-logs}
read -r -a template <<<"${SERVER_COMMAND:-$OLLAMA serve}"

mkdir -p "$ENDPOINTS_DIR" "$SERVER_LOGS" || usage_error "$ENDPOINTS_DIR or $SERVER_LOGS cannot be made"
command -v "${template[0]}" >/dev/null || usage_error "no ${template[0]} on the PATH; set OLLAMA or SERVER_COMMAND"

# The name under which other nodes reach this node.
host=${SERVER_HOST:-$BIND}
if [ "$host" = 0.0.0.0 ]; then
    for host in "${SLURMD_NODENAME:-}" "$(hostname)" 127.0.0.1; do
        [ -n "$host" ] && getent hosts "$host" >/dev/null && break
    done
fi

# On a workstation, CUDA_VISIBLE_DEVICES need not be set.
if [ -z "${CUDA_VISIBLE_DEVICES+set}" ] && [ -z "${SLURM_JOB_ID:-}" ]; then
    CUDA_VISIBLE_DEVICES=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd,)
fi
IFS=, read -r -a gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
SERVERS=${SERVERS:-${#gpus[@]}}
case $SERVERS in *[!0-9]*) usage_error "SERVERS is '$SERVERS', not a number" ;; esac
[ "$SERVERS" -gt 0 ] || usage_error "no GPU was allocated (CUDA_VISIBLE_DEVICES is empty); set SERVERS for servers without GPUs"

alive() { kill -0 "$1" 2>/dev/null; }

# Ends early at a trapped signal.
nap() {
    sleep "$1" &
    wait $!
}

# Finds a free port of this node.  Two slots of this job never choose the same, and the system does not assign ports below
# 32768.  If another job takes the port first, the server ends and is started again on another port.
free_port() {
    local tries port=${FIRST_PORT:+$((FIRST_PORT + $1))}
    for ((tries = 0; tries < 100; tries++)); do
        [ -n "$port" ] && break
        port=$((20000 + $1 + SERVERS * (RANDOM % (12000 / SERVERS))))
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && port=
    done
    echo "$port"
}

# start SLOT GPU LOG: sets ``server`` and ``registrar``, the processes of one server.
start() {
    local port word url words=()
    port=$(free_port "$1")
    url=http://$host:$port
    for word in "${template[@]}"; do
        word=${word//'{port}'/"$port"} word=${word//'{gpu}'/"$2"} word=${word//'{bind}'/"$BIND"}
        words+=("${word//'{model}'/"$MODEL"}")
    done
    (
        [ -n "$2" ] && export CUDA_VISIBLE_DEVICES=$2
        export OLLAMA_HOST=$BIND:$port OLLAMA_NUM_PARALLEL=$PARALLEL OLLAMA_KEEP_ALIVE=-1
        exec setsid "${words[@]}" >>"$3" 2>&1 </dev/null
    ) &
    server=$!
    PYTHONPATH=$PROJECT${PYTHONPATH:+:$PYTHONPATH} "${wrap[@]}" "$PYTHON" -m curation register \
        --dir "$ENDPOINTS_DIR" --url "$url" --model "$MODEL" --api "$API" --pid "$server" \
        --start_timeout "$START_TIMEOUT_S" --load_timeout "$LOAD_TIMEOUT_S" &
    registrar=$!
}

# Removes the server from the folder, lets its requests finish if there is time, and stops it and its children.
stop() {
    local until
    kill "$registrar" 2>/dev/null
    while alive "$registrar"; do wait "$registrar"; done
    wait "$registrar"
    registered=$?
    if [ -n "$stopping" ]; then
        until=$((SECONDS + DRAIN_S))
        while alive "$server" && [ $SECONDS -lt $until ]; do nap 0.5; done
    fi
    kill -s TERM -- "-$server" 2>/dev/null || kill "$server" 2>/dev/null
    until=$((SECONDS + 8))
    while alive "$server" && [ $SECONDS -lt $until ]; do nap 0.1; done
    kill -s KILL -- "-$server" 2>/dev/null
    wait "$server"
    ended=$?
}

# supervise SLOT GPU: runs one server until this job is asked to end or the server has failed too often.
supervise() {
    local slot=$1 gpu=$2 log failures=0 began server registrar registered ended stopping=
    log=$SERVER_LOGS/serve_endpoints-${SLURM_JOB_ID:-$$}-$slot.log
    trap 'stopping=yes' TERM USR1 INT
    while true; do
        began=$SECONDS
        start "$slot" "$gpu" "$log"
        while [ -z "$stopping" ] && alive "$server" && alive "$registrar"; do
            nap 0.5
            alive $$ && alive "${SERVE_FOR:-$$}" || stopping=yes # whoever it serves was killed
        done
        stop
        [ -n "$stopping" ] && return 0
        echo "the server ${gpu:+on GPU $gpu }has ended (code $ended, its registration $registered); $log ends with:" >&2
        tail -n 3 "$log" >&2
        [ "$registered" = 2 ] && return 2 # it lacks the model: it would again
        [ $((SECONDS - began)) -gt 600 ] && failures=0
        failures=$((failures + 1))
        [ "$failures" -gt "$RESTARTS" ] && return 2
        nap "$RESTART_PAUSE_S"
        [ -n "$stopping" ] && return 0
    done
}

supervisors=() asked=
end_all() {
    asked=yes
    kill "${supervisors[@]}" 2>/dev/null
}
trap end_all TERM USR1 INT
for ((slot = 0; slot < SERVERS; slot++)); do
    gpu=
    [ ${#gpus[@]} -gt 0 ] && gpu=${gpus[slot % ${#gpus[@]}]}
    supervise "$slot" "$gpu" &
    supervisors+=($!)
done
[ -n "$asked" ] && end_all # those that began after the signal
for process in "${supervisors[@]}"; do
    while alive "$process"; do wait "$process"; done
done
[ -n "$asked" ] && exit 0
[ -n "${SERVE_FOR:-}" ] && ! alive "$SERVE_FOR" && exit 0
echo "error: no server could be kept up" >&2
exit 2
