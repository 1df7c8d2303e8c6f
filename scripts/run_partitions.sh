# Sourced by run_*.sh: train and evaluate every partition of a task, skipping what is done, then print the means.
#   run_task TASK PARTITION…
# From the environment: DEVICE, SEED (123), DATA_DIR (datasets), TRAIN_ARGS and EVAL_ARGS (further options).
[ -z "${DATA_DIR:-}" ] || DATA_DIR=$(realpath -m "$DATA_DIR")
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
SEED=${SEED:-123}
common=(--data-dir "${DATA_DIR:-datasets}" ${DEVICE:+--device "$DEVICE"})

run_task() {
    local task=$1 results=()
    shift
    for partition in "$@"; do
        local name="${task}_${partition}"
        local classifier="ckpt/${name}_classifier_seed$SEED.pkl" cvae="ckpt/${name}_cvae_seed$SEED.pkl"
        for command in train_classifier train_cvae; do
            "$python" -m train --task "$task" --partition "$partition" --command "$command" \
                --params-dict-name "ckpt/${name}_${command#train_}_seed$SEED.pkl" --seed "$SEED" "${common[@]}" ${TRAIN_ARGS:-}
        done
        # Other options make other results, under another name; networks that were trained anew make new ones.
        local result="results/${name}_seed$SEED${EVAL_ARGS:+_$(cksum <<<"$EVAL_ARGS" | cut -d' ' -f1)}.json"
        if ! [[ $result -nt $classifier && $result -nt $cvae ]]; then
            "$python" -m eval --task "$task" --partition "$partition" --mode all --ood-dataset all --seed "$SEED" \
                --params-dict-name "$classifier" --params-dict-name2 "$cvae" --output "$result" \
                "${common[@]}" ${EVAL_ARGS:-}
        fi
        results+=("$result")
    done
    "$python" -m evaluation.summarise "${results[@]}"
}
