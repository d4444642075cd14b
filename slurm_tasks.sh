# shellcheck shell=bash
# Sourced by 01_filter_noface.sh, 03_generate_images.sh and 04_reshard.sh: how a stage runs as the tasks of a SLURM job.

# run_tasks OUTPUT COMMAND…: the command once per task of the allocation.  Ends the script with the stage's exit code,
# after queueing the job (this array element alone) again where it reached its time limit with work left.
run_tasks() {
    local output=$1
    shift
    local MAX_RESTARTS=${MAX_RESTARTS:-50} codes progress job recorded

    # srun gives only the highest code of its tasks, so that 75 would hide a 2: each task writes its own down.
    mkdir -p "$output" || exit 2
    notes=$(mktemp -d "$output/.job-${SLURM_JOB_ID:-0}.XXXXXX") || exit 2
    trap 'rm -rf "$notes"' EXIT
    touch "$notes/begun"
    export NOTES=$notes
    # shellcheck disable=SC2016  # expanded by the task's own bash
    recorded='trap : USR1 USR2 INT TERM; "$@"; code=$?; echo "$code" >"$NOTES/code.${SLURM_PROCID:-0}"; exit "$code"'

    cause='' step=''
    forward() { cause=${cause:-$1}; kill -s "$1" "$step" 2>/dev/null; }
    trap 'forward USR1' USR1
    trap 'forward TERM' TERM
    srun --kill-on-bad-exit=0 bash -c "$recorded" task "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do wait "$step"; done  # a trapped signal ends a wait

    codes=$(cat "$notes"/code.* 2>/dev/null | sort -un | tr '\n' ' ')
    echo "tasks ended with: ${codes:-nothing (killed)}${cause:+, asked to stop by $cause}"
    case " $codes" in
    *" 2 "*) exit 2 ;;
    *" 75 "*) ;;
    *" 1 "*) exit 1 ;;
    " 0 ") exit 0 ;;
    *) exit 1 ;;
    esac

    # Work is left.  Again only after the time limit (never after scancel's TERM), and only if something was finished.
    progress=$(find "$output/_receipts" "$output/_partial" -type f -newer "$notes/begun" -print -quit 2>/dev/null)
    if [ "$cause" = USR1 ] && [ -n "$progress" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_RESTARTS" ]; then
        job=$SLURM_JOB_ID
        [ -n "${SLURM_ARRAY_JOB_ID:-}" ] && job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
        echo "requeueing $job (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
        rm -rf "$notes"  # a requeued job is ended on the spot
        scontrol requeue "$job"
    fi
    exit 75
}
