#!/bin/bash
# Small jobs that fit into the gaps of a busy cluster: one GPU for half an hour, many times over.  A job saves its work
# before its time is up, puts itself into the queue again, and goes on where it was.
#
#     SRC_DIR=/path/to/shards ROOT=/path/to/root ./backfill-one-gpu-30min.sh
#
# Copy it, change what your site calls otherwise, and set CURATION_HOME to the project's folder.  What is set already when
# it starts goes first.
export CURATION_HOME=${CURATION_HOME:-$(dirname "$0")/../..}
export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-my_account}
export SBATCH_PARTITION=${SBATCH_PARTITION:-gpu}
# export SBATCH_QOS=preemptible # a preempted job is queued again by SLURM

# Compute nodes have no internet: fetch the weights on a login node (docs/running.md), and let no process ask for them.
export HF_HUB_OFFLINE=1

# Two minutes to save the current batch.  Each restart loads the model again: of half an hour, a model that takes three
# minutes to load costs a tenth.
export WARNING_S=${WARNING_S:-120} MAX_RESTARTS=${MAX_RESTARTS:-500}
short="--time=00:30:00 --signal=B:USR1@$WARNING_S"

# Stage 01: one task of four CPUs, which fits anywhere.
export ARRAY_01=${ARRAY_01:-0-15}
export SBATCH_01="$short --ntasks-per-node=1 --cpus-per-task=4 ${SBATCH_01:-}"

# Stage 02: one model server, one GPU.
export ARRAY_02=${ARRAY_02:-0-7}
export SBATCH_02="$short --gpus-per-node=1 --cpus-per-task=8 ${SBATCH_02:-}"

# Stage 03: no more than 32 at once.
export ARRAY_03=${ARRAY_03:-0-63%32}
export SBATCH_03="$short --ntasks-per-node=1 --gpus-per-task=1 --cpus-per-task=8 ${SBATCH_03:-}"

export ARRAY_04=${ARRAY_04:-0-3}
export SBATCH_04="$short --ntasks-per-node=2 --cpus-per-task=2 ${SBATCH_04:-}"

# Without --follow: no GPU is held by a job that waits for the stage before.
exec "$CURATION_HOME/run_pipeline.sh" "$@"
