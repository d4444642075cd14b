#!/bin/bash
# Stage 00 on a cluster, on a partition whose nodes reach the internet: tasks that share the shards by claims.  Submit
# it as often and with as many tasks as you like, until nothing is pending:
#
#     URLS=/path/to/tables ROOT=/path/to/root sbatch --array=0-3 00_download.sh
#     URLS=/path/to/tables TARGET_DIR=/path/to/shards sbatch 00_download.sh --retry_failed_urls
#     ADOPT=/path/to/folder sbatch 00_download.sh
#
# URLS is a table of URLs, a folder of them or a glob in quotes; TARGET_DIR, by default $ROOT/shards, takes the shards.
# ADOPT is a folder of img2dataset to take over, by default where it lies; URLS may then be left out.
# Without SLURM it runs on this machine, with WORKERS processes.  docs/slurm.md has every variable; those of the site's
# accounts are sbatch's own: SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_QOS.
#
# Ends with the stage's exit code: 0 all done, 1 some shards failed, 2 usage or machine, 75 work left.  At the time limit
# it requeues itself (in an array, only this element), as long as it makes progress.
#SBATCH --job-name=00_download
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=4
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

input=() adopt=()
if [ -n "${ADOPT:-}" ]; then
    plain ADOPT
    adopt=(--adopt "$ADOPT")
fi
TARGET_DIR=${TARGET_DIR:-${ADOPT:-${ROOT:+$ROOT/shards}}}
[ -n "${ADOPT:-}" ] || need URLS "the tables of URLs"
need TARGET_DIR "the folder for the shards (or ROOT)"

[ -z "${URLS:-}" ] || input_from "$URLS" "$@"
stage=("$PYTHON" "$PROJECT/00_download.py" "${input[@]}" "${adopt[@]}" --output "$TARGET_DIR")
run_tasks "$TARGET_DIR" "${stage[@]}" "${workers[@]}" "$@"
