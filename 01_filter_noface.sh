#!/bin/bash
# Stage 01 on a cluster: several tasks a node, all sharing the shards by claims.  Start it as often and as wide as you
# like, until nothing is pending:
#
#     SHARDS=/path/to/shards CAPTIONS=/path/to/captions EDITS=/path/to/edits sbatch --array=0-9 01_filter_noface.sh
#     SHARDS=… CAPTIONS=… EDITS=… sbatch 01_filter_noface.sh --embedded                     # any flag of the stage
#     SHARDS=… CAPTIONS=… EDITS=… sbatch --gpus-per-task=1 01_filter_noface.sh --detector scrfd
#
# SHARDS is a folder, a glob in quotes, braces in quotes, or a list file.
# Ends with the stage's exit code: 0 all done, 1 some shards failed, 2 usage or machine, 75 work left.  At the time limit
# it puts itself (this array element alone) into the queue again, as long as it gets on.
#SBATCH --job-name=01_filter_noface
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --mem-per-cpu=2G
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

: "${SHARDS:?the source shards}" "${CAPTIONS:?the folder for the captions}" "${EDITS:?the folder for the metadata}"
PYTHON=${PYTHON:-.venv/bin/python}
MAX_RESTARTS=${MAX_RESTARTS:-50}
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2  # sbatch runs a copy of this file elsewhere

# One task uses --cpus-per-task threads for a detector; with recorded boxes, more tasks of fewer CPUs are faster.
command=("$PYTHON" 01_filter_noface.py --input "$SHARDS" --output "$CAPTIONS" --edits "$EDITS" "$@")

# srun gives only the highest code of its tasks, so that 75 would hide a 2: each task writes its own down.
mkdir -p "$CAPTIONS" || exit 2
notes=$(mktemp -d "$CAPTIONS/.job-${SLURM_JOB_ID:-0}.XXXXXX") || exit 2
trap 'rm -rf "$notes"' EXIT
touch "$notes/begun"
export NOTES=$notes
recorded='trap : USR1 USR2 INT TERM; "$@"; code=$?; echo "$code" >"$NOTES/code.${SLURM_PROCID:-0}"; exit "$code"'

cause= step=
forward() { cause=${cause:-$1}; kill -s "$1" "$step" 2>/dev/null; }
trap 'forward USR1' USR1
trap 'forward TERM' TERM
srun --kill-on-bad-exit=0 bash -c "$recorded" task "${command[@]}" &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done  # a trapped signal ends a wait

codes=$(cat "$notes"/code.* 2>/dev/null | sort -un | tr '\n' ' ')
echo "tasks ended with: ${codes:-nothing (killed)}${cause:+, asked to stop by $cause}"
case " $codes" in
*" 2 "*) exit 2 ;;
*" 75 "*) ;;
*" 1 "*) exit 1 ;;
" 0 ") exit 0 ;;
*) exit 1 ;;
esac

# Work is left.  Again only after the time limit (never after scancel's TERM), and only if something was finished.
progress=$(find "$CAPTIONS/_receipts" "$CAPTIONS/_partial" -type f -newer "$notes/begun" -print -quit 2>/dev/null)
if [ "$cause" = USR1 ] && [ -n "$progress" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_RESTARTS" ]; then
    job=$SLURM_JOB_ID
    [ -n "${SLURM_ARRAY_JOB_ID:-}" ] && job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
    echo "requeueing $job (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
    rm -rf "$notes"  # a requeued job is ended on the spot
    scontrol requeue "$job"
fi
exit 75
