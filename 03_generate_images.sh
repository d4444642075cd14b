#!/bin/bash
# Stage 03 on a cluster: one task per GPU, all sharing the shards by claims.  Submit it as often and with as many tasks
# as you like, until nothing is pending:
#
#     ROOT=/path/to/root sbatch --array=0-9 03_generate_images.sh
#     SRC_DIR=/path/to/prompts TARGET_DIR=/path/to/edits sbatch 03_generate_images.sh --model stabilityai/sd-turbo
#
# SRC_DIR, by default $ROOT/prompts, contains stage 02's prompts; TARGET_DIR, by default $ROOT/edits, contains
# stage 01's metadata and receives the images.
# Without SLURM it runs on this machine, with WORKERS processes.  docs/slurm.md has every variable; those of the site's
# accounts are sbatch's own: SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_QOS.
#
# Ends with the stage's exit code: 0 all done, 1 some shards failed, 2 usage or machine, 75 work left.  At the time limit
# and when a GPU fails it requeues itself (in an array, only this element), as long as it makes progress.
#SBATCH --job-name=03_generate_images
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

SRC_DIR=${SRC_DIR:-${ROOT:+$ROOT/prompts}} TARGET_DIR=${TARGET_DIR:-${ROOT:+$ROOT/edits}}
need SRC_DIR "the folder of prompts that stage 02 wrote (or ROOT)"
need TARGET_DIR "the folder of metadata that stage 01 wrote (or ROOT)"

# In a new folder each image is checked for a face, and made again without one; docs/stage-03.md, Checks:
#     sbatch 03_generate_images.sh --check face,prompt,group,safety --tries 4 --on_check_failure reject
# torch.compile and the like are worth trying on your GPUs (docs/stage-03.md, Speed):
#     sbatch 03_generate_images.sh --compile blocks --channels_last --fuse_qkv --text_batches 4
input_from "$SRC_DIR" "$@"
stage=("$PYTHON" "$PROJECT/03_generate_images_multigpu.py" "${input[@]}" --output "$TARGET_DIR")
run_tasks "$TARGET_DIR" "${stage[@]}" "${workers[@]}" "$@"
