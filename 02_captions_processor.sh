#!/bin/bash
# Stage 02 on a cluster: an Ollama server for each GPU of the node, and the stage that asks them.  Start it as often and as
# wide as you like, until nothing is pending; all share the shards by claims:
#
#     CAPTIONS=/path/to/captions PROMPTS=/path/to/prompts sbatch --array=0-9 02_captions_processor.sh
#     CAPTIONS=… PROMPTS=… sbatch 02_captions_processor.sh --groups none                     # any flag of the stage
#     CAPTIONS=… PROMPTS=… ENDPOINTS=http://gpu1:8000,http://gpu2:8000 sbatch --gpus=0 02_captions_processor.sh
#
# The model must have been made where the servers look for it (OLLAMA_MODELS, by default ~/.ollama/models):
#     ollama create tulu3:fairclip -f examples/ollama/Modelfile
#
# Ends with the stage's exit code: 0 all done, 1 some shards failed, 2 usage or machine, 75 work left.  At the time limit
# it puts itself (this array element alone) into the queue again, as long as it gets on.
#SBATCH --job-name=02_captions_processor
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

: "${CAPTIONS:?the folder of captions that stage 01 wrote}" "${PROMPTS:?the folder for the prompts}"
PYTHON=${PYTHON:-.venv/bin/python}
OLLAMA=${OLLAMA:-ollama}
PARALLEL=${PARALLEL:-4} # captions that each server works on at once
MAX_RESTARTS=${MAX_RESTARTS:-50}
START_TIMEOUT_S=${START_TIMEOUT_S:-120}
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2 # sbatch runs a copy of this file elsewhere

mkdir -p "$PROMPTS" || exit 2
notes=$(mktemp -d "$PROMPTS/.job-${SLURM_JOB_ID:-0}.XXXXXX") || exit 2
touch "$notes/begun"
servers=() stage=
clear_up() {
    [ ${#servers[@]} -gt 0 ] && kill "${servers[@]}" 2>/dev/null
    rm -rf "$notes"
}
trap clear_up EXIT

cause=
forward() {
    cause=${cause:-$1}
    [ -n "$stage" ] && kill -s "$1" "$stage" 2>/dev/null
}
trap 'forward USR1' USR1
trap 'forward TERM' TERM

listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# One server per GPU.  The ports follow from the job, so that two jobs on one node do not meet.
start_servers() {
    local gpus gpu port=$((20000 + ${SLURM_JOB_ID:-0} % 20000)) ports=()
    IFS=, read -r -a gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
    [ ${#gpus[@]} -gt 0 ] || { echo "error: no GPU was allocated (CUDA_VISIBLE_DEVICES is empty); set ENDPOINTS" >&2 && exit 2; }
    command -v "$OLLAMA" >/dev/null || { echo "error: no $OLLAMA on the PATH; set OLLAMA or ENDPOINTS" >&2 && exit 2; }
    for gpu in "${gpus[@]}"; do
        while listens "$port"; do port=$((port + 1)); done
        CUDA_VISIBLE_DEVICES=$gpu OLLAMA_HOST=127.0.0.1:$port OLLAMA_NUM_PARALLEL=$PARALLEL OLLAMA_KEEP_ALIVE=-1 \
            "$OLLAMA" serve >"$notes/ollama.$gpu.log" 2>&1 &
        servers+=($!)
        ports+=("$port")
        port=$((port + 1))
    done
    for port in "${ports[@]}"; do
        local ends=$((SECONDS + START_TIMEOUT_S))
        until listens "$port"; do
            if [ $SECONDS -ge $ends ] || [ -n "$cause" ]; then
                echo "error: the Ollama server on port $port did not start:" >&2
                tail -n 3 "$notes"/ollama.*.log >&2
                exit 2
            fi
            sleep 0.2
        done
    done
    where=(--host 127.0.0.1 --ports "$(IFS=, && echo "${ports[*]}")" --api ollama)
}

if [ -n "${ENDPOINTS:-}" ]; then where=(--endpoints "$ENDPOINTS"); else start_servers; fi
"$PYTHON" 02_captions_processor.py --input "$CAPTIONS" --output "$PROMPTS" "${where[@]}" "$@" &
stage=$!
while kill -0 "$stage" 2>/dev/null; do wait "$stage"; done # a trapped signal ends a wait
wait "$stage"
code=$?
case $code in 0 | 1 | 2) exit "$code" ;; 75) ;; *) exit 1 ;; esac

# Work is left.  Again only after the time limit (never after scancel's TERM), and only if something was finished.
progress=$(find "$PROMPTS/_receipts" "$PROMPTS/_partial" -type f -newer "$notes/begun" -print -quit 2>/dev/null)
if [ "$cause" = USR1 ] && [ -n "$progress" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_RESTARTS" ]; then
    job=$SLURM_JOB_ID
    [ -n "${SLURM_ARRAY_JOB_ID:-}" ] && job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
    echo "requeueing $job (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
    clear_up # a requeued job is ended on the spot
    scontrol requeue "$job"
fi
exit 75
