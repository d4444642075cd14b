#!/bin/bash
# Stage 04 on a cluster: several tasks a node, all sharing the shards by claims.  Submit it as often and with as many
# tasks as you like, until nothing is pending:
#
#     SRC_DIR=/path/to/shards TARGET_DIR=/path/to/root/shards sbatch 04_reshard.sh
#     SRC_DIR=… ROOT=/path/to/root sbatch --array=0-9 04_reshard.sh --verify                 # any flag of the stage
#
# One tar by its own files: SRC_DIR=x.tar TARGET_DIR=out/x.tar EDITS_DIR=edits/x 04_reshard.sh.  Its receipts are in out/.
# SRC_DIR, the source shards, is a folder, a glob in quotes, braces in quotes, or a list file.  EDITS_DIR and PROMPTS_DIR
# are by default edits/ and prompts/ beside TARGET_DIR; with ROOT, TARGET_DIR is $ROOT/shards.  EDITS_DIR=none leaves
# the samples unchanged, for a subset (--subset keep.npy), shards of one size (--shard_size 10000), or another mix of captions
# (--captions /path/to/root/recaptions --mix 0.3:web,0.7:synthetic).
# Without SLURM it runs on this machine, with WORKERS processes.  docs/slurm.md has every variable; those of the site's
# accounts are sbatch's own: SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_QOS.
#
# Ends with the stage's exit code: 0 all done, 1 some shards failed, 2 usage or machine, 75 work left.  At the time limit
# it requeues itself (in an array, only this element), as long as it makes progress.
#SBATCH --job-name=04_reshard
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=2
#SBATCH --mem-per-cpu=1G
#SBATCH --time=02:00:00
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

TARGET_DIR=${TARGET_DIR:-${ROOT:+$ROOT/shards}}
need SRC_DIR "the source shards"
need TARGET_DIR "the folder for the hybrid shards (or ROOT, which holds shards/)"
case $TARGET_DIR in # the file of one tar, unless it is a folder of that name
*.tar) [ -d "$TARGET_DIR" ] && folder=$TARGET_DIR || folder=$(dirname "$TARGET_DIR") ;;
*) folder=$TARGET_DIR ;;
esac
# The edits of one tar were named by themselves: they need no prompts, as in the call of the Python script.
[ "$folder" != "$TARGET_DIR" ] && [ -n "${EDITS_DIR:-}" ] && PROMPTS_DIR=${PROMPTS_DIR:-none}
EDITS_DIR=${EDITS_DIR:-$(dirname "$folder")/edits} PROMPTS_DIR=${PROMPTS_DIR:-$(dirname "$folder")/prompts}

# A task uses two CPUs: one reads ahead while the other writes.
input_from "$SRC_DIR" "$@"
stage=("$PYTHON" "$PROJECT/04_reshard.py" "${input[@]}")
[ "$EDITS_DIR" = none ] || given --edits "$@" || stage+=(--edits "$EDITS_DIR")
[ "$EDITS_DIR" = none ] || [ "$PROMPTS_DIR" = none ] || given --prompts "$@" || stage+=(--prompts "$PROMPTS_DIR")
run_tasks "$folder" "${stage[@]}" --output "$TARGET_DIR" "${workers[@]}" "$@"
