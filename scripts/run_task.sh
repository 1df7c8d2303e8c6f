# Sourced by run_*.sh: `python -m reproduce` for every partition of a task, which skips what is done and prints the means.
#   run_task TASK [further options of reproduce]
# From the environment: DEVICE, SEEDS (1), DATA_DIR (datasets), TRAIN_ARGS and EVAL_ARGS (further options of train, eval).
[ -z "${DATA_DIR:-}" ] || DATA_DIR=$(realpath -m "$DATA_DIR")
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

run_task() {
    local task=$1
    shift
    "$python" -m reproduce --task "$task" --seeds "${SEEDS:-1}" --data-dir "${DATA_DIR:-datasets}" \
        ${DEVICE:+--device "$DEVICE"} --classifier-args="${TRAIN_ARGS:-}" --cvae-args="${TRAIN_ARGS:-}" \
        --eval-args="${EVAL_ARGS:-}" "$@"
}
