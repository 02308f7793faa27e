#!/usr/bin/env bash
# One Markdown table about a CUDA device: tests, parity with the CPU, speed. Eight minutes; installs nothing.
#
#     bash tests/cuda.sh > cuda.md                # every row
#     bash tests/cuda.sh decode_300M codec        # some of those below, in the order below
#     bash tests/cuda.sh --seconds 240            # in less time
#     bash tests/cuda.sh --device cpu --quick     # tiny shapes on the CPU, to try the script itself
#
# Each row is a process of its own (tests/cuda_rows.py) with a limit in seconds. Where one fails the table has
# FAILED with the last line of its stderr, of which stderr has more, and the others go on. Exit code: 0, 1 if
# a row failed, 2 without a CUDA device.
set -u
cd "$(dirname "$0")/.." || exit 1
rows="tests:60 parity_float32:60 parity_float16:60 parity_bfloat16:60 sample_tiny:30 decode_300M:60
      decode_1.5B:80 profile_1.5B:30 codec:40 train_300M:45 train_1.5B:80 parallel:40 compile_decode:80 compile_train:80
      sample_300M:30 sample_1.5B:45"
total=480 device=cuda quick="" chosen=""
python=$(command -v python || command -v python3)
command="bash tests/cuda.sh $*"
while (($#)); do
    case $1 in
        --device) device=${2:-}; shift ;;
        --seconds) total=${2:-}; shift ;;
        --quick) quick=--quick ;;
        *) chosen+=" $1" ;;
    esac
    shift
done

if [ "$device" = cuda ] && ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "tests/cuda.sh: not run, as torch finds no CUDA device; --device cpu --quick tries the script" >&2
    exit 2
fi

errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
failed=0
run() {     # NAME LIMIT
    local left=$((total - SECONDS)) code message
    if ((left < 1)); then
        echo "| $1 | not run: the $total s are over | | |"
        return
    fi
    local limit=$(($2 < left ? $2 : left))
    timeout -k 5 "$limit" "$python" tests/cuda_rows.py "$1" --device "$device" $quick 2> "$errors" && return
    code=$? failed=1
    message=$(tr '\r|' '\n/' < "$errors" | grep -v '^ *$' | tail -n 1 | cut -c 1-200)
    ((code == 124)) && message="its $limit s are over; $message"
    echo "| $1 | FAILED ($code): $message | | |"
    echo "--- $1" >&2
    tail -n 30 "$errors" >&2
}

echo "\`$command\`"
"$python" tests/cuda_rows.py heading --device "$device" $quick || exit 1
for row in $rows; do
    name=${row%:*}
    if [ -z "$chosen" ] || [[ " $chosen " == *" $name "* ]]; then
        run "$name" "${row#*:}"
    fi
done
for name in $chosen; do     # what is no row fails as a row does
    [[ " $rows" == *[[:space:]]"$name":* ]] || run "$name" 30
done
echo
echo "$SECONDS s"
exit $failed
