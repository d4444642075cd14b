#!/bin/bash
# Stage 03 on a cluster: one task per GPU, all sharing the shards by claims.  Start it as often and as wide as you like,
# until nothing is pending:
#
#     PROMPTS=/path/to/prompts EDITS=/path/to/edits sbatch --array=0-9 03_generate_images.sh
#     PROMPTS=… EDITS=… sbatch 03_generate_images.sh --model stabilityai/sd-turbo      # any flag of the stage
#
# Ends with the stage's exit code: 0 all done, 1 some shards failed, 2 usage or machine, 75 work left.  At the time limit
# it puts itself (this array element alone) into the queue again, as long as it gets on.
#SBATCH --job-name=03_generate_images
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

: "${PROMPTS:?the folder of prompts that stage 02 wrote}" "${EDITS:?the folder of metadata that stage 01 wrote}"
PYTHON=${PYTHON:-.venv/bin/python}
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2  # sbatch runs a copy of this file elsewhere

# torch.compile and the like are worth trying on your GPUs (docs/stage-03.md, Speed):
#     sbatch 03_generate_images.sh --compile blocks --channels_last --fuse_qkv --text_batches 4
source ./slurm_tasks.sh
run_tasks "$EDITS" "$PYTHON" 03_generate_images_multigpu.py --prompts "$PROMPTS" --edits "$EDITS" "$@"
