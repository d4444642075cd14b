#!/bin/bash
# A partition of CPU nodes: stages 01 and 02 there, and later stage 04.  The model servers that stage 02 asks and the GPUs
# of stage 03 are elsewhere.
#
#     SRC_DIR=/path/to/shards ROOT=/path/to/root ./cpu-partition.sh                  # stages 01 and 02
#     SRC_DIR=/path/to/shards ROOT=/path/to/root ./cpu-partition.sh --stages 04      # when stage 03 is through
#
# Copy it, change what your site calls otherwise, and set CURATION_HOME to the project's folder.  What is set already when
# it starts goes first.
export CURATION_HOME=${CURATION_HOME:-$(dirname "$0")/../..}

# sbatch's own variables: they go before what the stages' scripts say
export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-my_account}
export SBATCH_PARTITION=${SBATCH_PARTITION:-cpu}

# Stage 01.  DataComp's shards record where the faces are: one CPU a task, and each task works on a shard of its own.  Ten
# jobs of 32 such tasks; with fewer shards than tasks, the rest end after a few minutes.
export ARRAY_01=${ARRAY_01:-0-9}
export SBATCH_01="--ntasks-per-node=32 --cpus-per-task=1 --time=02:00:00 ${SBATCH_01:-}"
export FLAGS_01=${FLAGS_01:---detector recorded}
# With a detector, on CPUs, a task uses all of its CPUs:
#     SBATCH_01='--ntasks-per-node=4 --cpus-per-task=8' FLAGS_01='--detector centerface'

# Stage 02 waits for servers that work on many captions at once, so one process is enough.  Name servers that run already,
# or a folder in which jobs of serve_endpoints.sh register.
[ -n "${ENDPOINTS_DIR:-}" ] || export ENDPOINTS=${ENDPOINTS:-http://gpu1:8000,http://gpu2:8000}
export SBATCH_02="--ntasks-per-node=1 --cpus-per-task=4 --time=12:00:00 ${SBATCH_02:-}"

# Stage 04 is as fast as the filesystem: a few tasks a node, and few nodes.
export ARRAY_04=${ARRAY_04:-0-1}
export SBATCH_04="--ntasks-per-node=8 --cpus-per-task=2 --time=02:00:00 ${SBATCH_04:-}"

exec "$CURATION_HOME/run_pipeline.sh" --stages 01-02 "$@"
