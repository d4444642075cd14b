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
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2  # sbatch runs a copy of this file elsewhere

# One task uses --cpus-per-task threads for a detector; with recorded boxes, more tasks of fewer CPUs are faster.
source ./slurm_tasks.sh
run_tasks "$CAPTIONS" "$PYTHON" 01_filter_noface.py --input "$SHARDS" --output "$CAPTIONS" --edits "$EDITS" "$@"
