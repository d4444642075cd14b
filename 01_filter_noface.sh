#!/bin/bash
# Stage 01 on a cluster: several tasks a node, all sharing the shards by claims.  Submit it as often and with as many
# tasks as you like, until nothing is pending:
#
#     SRC_DIR=/path/to/shards TARGET_DIR=/path/to/root/captions sbatch --array=0-9 01_filter_noface.sh
#     SRC_DIR=… ROOT=/path/to/root sbatch 01_filter_noface.sh --embedded                     # any flag of the stage
#     SRC_DIR=… ROOT=… sbatch --gpus-per-task=1 01_filter_noface.sh --detector scrfd
#
# SRC_DIR is a folder, a glob in quotes, braces in quotes, or a list file.  The kept samples' metadata go to EDITS_DIR, by
# default edits/ beside TARGET_DIR.
# Without SLURM it runs on this machine, with WORKERS processes.  docs/slurm.md has every variable; those of the site's
# accounts are sbatch's own: SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_QOS.
#
# Ends with the stage's exit code: 0 all done, 1 some shards failed, 2 usage or machine, 75 work left.  At the time limit
# and when a GPU fails it requeues itself (in an array, only this element), as long as it makes progress.
#SBATCH --job-name=01_filter_noface
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --mem-per-cpu=2G
#SBATCH --time=04:00:00
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

TARGET_DIR=${TARGET_DIR:-${ROOT:+$ROOT/captions}}
need SRC_DIR "the source shards"
need TARGET_DIR "the folder for the captions (or ROOT, which holds captions/)"
EDITS_DIR=${EDITS_DIR:-$(dirname "$TARGET_DIR")/edits}

# One task uses --cpus-per-task threads for a detector; with recorded boxes, more tasks of fewer CPUs are faster.
input_from "$SRC_DIR" "$@"
stage=("$PYTHON" "$PROJECT/01_filter_noface.py" "${input[@]}" --output "$TARGET_DIR")
given --edits "$@" || stage+=(--edits "$EDITS_DIR")
run_tasks "$TARGET_DIR" "${stage[@]}" "${workers[@]}" "$@"
