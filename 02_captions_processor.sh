#!/bin/bash
# Stage 02 on a cluster: a model server for each GPU of the node, and the stage.  Submit it as often and with as many
# tasks as you like, until nothing is pending; all tasks share the shards by claims:
#
#     ROOT=/path/to/root sbatch --array=0-9 02_captions_processor.sh
#     SRC_DIR=/path/to/captions TARGET_DIR=/path/to/prompts sbatch 02_captions_processor.sh --groups none
#
# SRC_DIR, by default $ROOT/captions, has stage 01's captions; TARGET_DIR, by default $ROOT/prompts, gets the prompts.
# With one of these variables it starts no server and needs no GPU:
#
#     ENDPOINTS_DIR=/path/to/endpoints  where servers of other jobs register (serve_endpoints.sh)
#     ENDPOINTS=http://gpu1:8000,…      servers that run elsewhere
#     PORTS=11434,11435                 servers that run on this node
# With --served vllm (or llama) behind the script's name the stage starts its servers itself.
#
# The model must exist in the folder of the servers (OLLAMA_MODELS, by default ~/.ollama/models):
#     ollama pull tulu3 && ollama create tulu3:fairclip -f examples/ollama/Modelfile
#
# Without SLURM it runs on this machine, with WORKERS processes.  docs/stage-02.md has the variables of the servers,
# docs/slurm.md all others; those of the site's accounts are sbatch's own: SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_QOS.
#
# Ends with the stage's exit code: 0 all done, 1 some shards failed, 2 usage or machine, 75 work left.  At the time limit
# it requeues itself (in an array, only this element), as long as it makes progress.
#SBATCH --job-name=02_captions_processor
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@180
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

SRC_DIR=${SRC_DIR:-${ROOT:+$ROOT/captions}} TARGET_DIR=${TARGET_DIR:-${ROOT:+$ROOT/prompts}}
need SRC_DIR "the folder of captions that stage 01 wrote (or ROOT)"
need TARGET_DIR "the folder for the prompts (or ROOT)"

# The servers load the model that the stage will ask for.
MODEL=${MODEL:-tulu3:fairclip}
previous='' embedded='' served=''
for word in "$@"; do
    case $previous in --model_name | --model-name | --model) MODEL=$word ;; esac
    case $word in --model_name=* | --model-name=* | --model=*) MODEL=${word#*=} ;; --embedded) embedded=yes ;; --served | --served=*) served=yes ;; esac
    previous=$word
done

# These servers are for this job only: they end with it, even if it is killed.
start_servers() {
    mkdir -p "$TARGET_DIR" || usage_error "the folder $TARGET_DIR cannot be made"
    own=$(mktemp -d "$TARGET_DIR/.job-servers-${SLURM_JOB_ID:-0}.XXXXXX") || usage_error "the folder $TARGET_DIR cannot be written"
    trap clear_up EXIT
    trap 'asked=yes' USR1 TERM INT
    MODEL=$MODEL ENDPOINTS_DIR=$own SERVER_LOGS=$own BIND=127.0.0.1 SERVER_HOST='' DRAIN_S=0 SERVE_FOR=$$ \
        "$PROJECT/serve_endpoints.sh" &
    servers=$!
    until [ -n "$(find "$own" -name '*.json' -print -quit)" ]; do
        kill -0 "$servers" 2>/dev/null || usage_error "no model server started"
        [ -n "$asked" ] && exit 75
        sleep 0.2
    done
    where=(--endpoints_dir "$own")
}

servers='' own='' asked=''
clear_up() {
    [ -n "$servers" ] && kill "$servers" 2>/dev/null && while kill -0 "$servers" 2>/dev/null; do wait "$servers"; done
    [ -n "$own" ] && rm -rf "$own"
    servers='' own=''
}

name=(--model_name "$MODEL") where=()
if [ -n "$embedded" ]; then
    name=() # the stage brings its own model
elif [ -n "$served" ]; then
    where=() # the stage starts its servers
elif [ -n "${ENDPOINTS_DIR:-}" ]; then
    where=(--endpoints_dir "$ENDPOINTS_DIR")
elif [ -n "${ENDPOINTS:-}" ]; then
    where=(--endpoints "$ENDPOINTS")
elif [ -n "${PORTS:-}" ]; then
    where=(--ports "$PORTS")
else
    start_servers
fi

input_from "$SRC_DIR" "$@"
stage=("$PYTHON" "$PROJECT/02_captions_processor.py" "${input[@]}" --output "$TARGET_DIR" "${name[@]}")
run_tasks "$TARGET_DIR" "${stage[@]}" "${where[@]}" "${workers[@]}" "$@"
