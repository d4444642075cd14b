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
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2  # sbatch runs a copy of this file elsewhere

# A task uses two CPUs: one reads ahead while the other writes.
source ./slurm_tasks.sh
run_tasks "$HYBRID" "$PYTHON" 04_reshard.py --input "$SHARDS" --edits "$EDITS" --prompts "$PROMPTS" --output "$HYBRID" "$@"
