#!/bin/bash
# Stage 04 on a cluster: several tasks a node, all sharing the shards by claims.  Start it as often and as wide as you
# like, until nothing is pending:
#
#     SHARDS=/path/to/shards EDITS=/path/to/edits PROMPTS=/path/to/prompts HYBRID=/path/to/hybrid sbatch 04_reshard.sh
#     SHARDS=… EDITS=… PROMPTS=… HYBRID=… sbatch --array=0-9 04_reshard.sh --verify          # any flag of the stage
#
# SHARDS is a folder, a glob in quotes, braces in quotes, or a list file.
# Ends with the stage's exit code: 0 all done, 1 some shards failed, 2 usage or machine, 75 work left.  At the time limit
# it puts itself (this array element alone) into the queue again, as long as it gets on.
#SBATCH --job-name=04_reshard
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=2
#SBATCH --mem-per-cpu=1G
#SBATCH --time=02:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

: "${SHARDS:?the source shards}" "${EDITS:?the folder of the edits}" "${PROMPTS:?the folder of the prompts}"
: "${HYBRID:?the folder for the hybrid shards}"
PYTHON=${PYTHON:-.venv/bin/python}
MAX_RESTARTS=${MAX_RESTARTS:-50}
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2  # sbatch runs a copy of this file elsewhere

# A task uses two CPUs: one reads ahead while the other writes.
command=("$PYTHON" 04_reshard.py --input "$SHARDS" --edits "$EDITS" --prompts "$PROMPTS" --output "$HYBRID" "$@")

# srun gives only the highest code of its tasks, so that 75 would hide a 2: each task writes its own down.
mkdir -p "$HYBRID" || exit 2
notes=$(mktemp -d "$HYBRID/.job-${SLURM_JOB_ID:-0}.XXXXXX") || exit 2
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
progress=$(find "$HYBRID/_receipts" "$HYBRID/_partial" -type f -newer "$notes/begun" -print -quit 2>/dev/null)
if [ "$cause" = USR1 ] && [ -n "$progress" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_RESTARTS" ]; then
    job=$SLURM_JOB_ID
    [ -n "${SLURM_ARRAY_JOB_ID:-}" ] && job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
    echo "requeueing $job (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
    rm -rf "$notes"  # a requeued job is ended on the spot
    scontrol requeue "$job"
fi
exit 75
