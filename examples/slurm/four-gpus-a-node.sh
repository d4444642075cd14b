#!/bin/bash
# Nodes with four GPUs, beside a CPU partition: all four stages.  A stage starts on shards as soon as the stage before has
# published them, so that the GPUs do not wait for the last CPU shard.
#
#     SRC_DIR=/path/to/shards ROOT=/path/to/root ./four-gpus-a-node.sh
#
# Copy it, change what your site calls otherwise, and set CURATION_HOME to the project's folder.  What is set already when
# it starts goes first.
export CURATION_HOME=${CURATION_HOME:-$(dirname "$0")/../..}
export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-my_account}
cpu=${CPU_PARTITION:-cpu} gpu=${GPU_PARTITION:-gpu}

# Compute nodes have no internet: fetch the weights on a login node (docs/running.md), and let no process ask for them.
export HF_HUB_OFFLINE=1

# Stage 01: five jobs of 32 one-CPU tasks, for shards that record where the faces are.
export ARRAY_01=${ARRAY_01:-0-4}
export SBATCH_01="--partition=$cpu --ntasks-per-node=32 --cpus-per-task=1 --time=04:00:00 ${SBATCH_01:-}"
export FLAGS_01=${FLAGS_01:---detector recorded}

# Stage 02: two jobs, each with a whole node and a model server on each of its GPUs.
export ARRAY_02=${ARRAY_02:-0-1}
export SBATCH_02="--partition=$gpu --gpus-per-node=4 --cpus-per-task=16 --time=12:00:00 ${SBATCH_02:-}"

# Stage 03: eight nodes, one task for each GPU.  One job a node, each with a time limit and restarts of its own.
export ARRAY_03=${ARRAY_03:-0-7}
export SBATCH_03="--partition=$gpu --ntasks-per-node=4 --gpus-per-task=1 --cpus-per-task=8 --time=12:00:00 ${SBATCH_03:-}"
export FLAGS_03=${FLAGS_03:---model black-forest-labs/FLUX.1-schnell}

# Stage 04: two jobs; it is as fast as the filesystem.
export ARRAY_04=${ARRAY_04:-0-1}
export SBATCH_04="--partition=$cpu --ntasks-per-node=8 --cpus-per-task=2 --time=04:00:00 ${SBATCH_04:-}"

exec "$CURATION_HOME/run_pipeline.sh" --follow "$@"
