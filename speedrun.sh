#!/usr/bin/env bash
# From a clone to the model that ships, on two CPU cores, in one go: tunes, codec, tokens, language model, figures.
#
#     bash speedrun.sh                                     # run it again to continue where it was stopped
#     bash speedrun.sh --epochs=1 --updates_per_epoch=20   # a trial: flags for the length of both trainings
#     CLIPS="1 1 1" bash speedrun.sh                       # of each tune, for training, validation and test
#
# The model is then in out/speedrun/model, and the seconds of each step in out/speedrun/seconds. Flags reach the
# trainings alone, neither what is prepared before nor what is measured after them.
set -euo pipefail
cd "$(dirname "$0")"
# a process a core is faster than two threads in one
run="env OMP_NUM_THREADS=1 torchrun --nproc_per_node=${PROCESSES:-2}"
mkdir -p out/speedrun
flags=out/speedrun/flags            # what this run was begun with
parts=out/speedrun/parts            # seconds of each step, of interrupted calls too
seconds=out/speedrun/seconds        # their sums, of finished steps
touch "$parts" "$seconds"

asked="CLIPS='${CLIPS:-}' $*"
[ -e "$flags" ] || echo "$asked" > "$flags"
if [ "$(cat "$flags")" != "$asked" ]; then
    echo "out/ has a run with other flags ($(cat "$flags")): repeat them to continue it, or delete it" \
         "(rm -r out/speedrun out/tiny out/tiny_start out/tiny_codec data/tunes data/prepared) to begin anew" >&2
    exit 2
fi

step() {                            # step NAME COMMAND ...: passed over where an earlier call finished it
    if ! grep -q "^$1 " "$seconds"; then
        echo "=== $1"
        name=$1 start=$SECONDS
        trap 'echo "$name $((SECONDS - start))" >> "$parts"' EXIT
        "${@:2}"
        trap - EXIT
        echo "$name $((SECONDS - start))" >> "$parts"
        awk -v name="$name" '$1 == name { sum += $2 } END { print name, sum }' "$parts" >> "$seconds"
    fi
}

train() {                           # train CONFIG FOLDER FLAGS ...: from its last checkpoint, if it has one
    local resume=""
    if [ -e "$2/state.safetensors" ]; then
        resume=--resume
    fi
    $run train.py "$1" $resume "${@:3}"
}

prepare() {
    $run data/prepare.py "data/tunes/$1/songs" --out "data/prepared/$1" --config config/tiny.py --stem none
}

step tunes python data/tunes.py ${CLIPS:+--clips $CLIPS}
step codec train config/tiny_codec.py out/tiny_codec "$@"
step prepare_train prepare train
step prepare_valid prepare valid
step prepare_test prepare test
# short segments first: a caption is learned from its first seconds, and so four times as many are read
step language_model_start train config/tiny.py out/tiny_start --out_dir=out/tiny_start \
    --segment_duration=2.56 --batch_size=16 --epochs=28 "$@"
step language_model train config/tiny.py out/tiny --init_from=out/tiny_start "$@"
step export python sample.py --checkpoint out/tiny --export out/speedrun/model
step evaluate_codec python train.py config/tiny_codec.py --eval --split test --out_dir=out/speedrun/model/codec
step evaluate python train.py config/tiny.py --eval --split test --out_dir=out/speedrun/model
cat "$seconds"
