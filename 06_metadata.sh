#!/bin/bash
# Stage 06 on a cluster: one task per GPU, all sharing the shards by claims.  Submit it as often and with as many tasks
# as you like, until nothing is pending:
#
#     ROOT=/path/to/root sbatch --array=0-9 06_metadata.sh --yml datacomp.yml
#     SRC_DIR=/path/to/shards TARGET_DIR=/path/to/metadata sbatch 06_metadata.sh --models oai-clip-vit-b32
#
# SRC_DIR, by default $ROOT/shards, is a folder, a glob in quotes, braces in quotes, or a list file; TARGET_DIR, by
# default $ROOT/metadata, receives the parquets and npzs.  Both take precedence over the YAML; without
# them, the YAML's input_tars and output_metadata_dir are used.
# Without SLURM it runs on this machine, with WORKERS processes.  docs/slurm.md has every variable; those of the site's
# accounts are sbatch's own: SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_QOS.
#
# Ends with the stage's exit code: 0 all done, 1 some shards failed, 2 usage or machine, 75 work left.  At the time limit
# and when a GPU fails it requeues itself (in an array, only this element), as long as it makes progress.
#SBATCH --job-name=06_metadata
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
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

SRC_DIR=${SRC_DIR:-${ROOT:+$ROOT/shards}} TARGET_DIR=${TARGET_DIR:-${ROOT:+$ROOT/metadata}}
folders=() # what is not set here, the YAML tells
[ -n "$SRC_DIR" ] && input_from "$SRC_DIR" "$@" && folders+=("${input[@]}")
[ -n "$TARGET_DIR" ] && folders+=(--output "$TARGET_DIR")

stage=("$PYTHON" "$PROJECT/06_metadata.py" "${folders[@]}")
run_tasks "${TARGET_DIR:-$PWD/logs}" "${stage[@]}" "${workers[@]}" "$@"
