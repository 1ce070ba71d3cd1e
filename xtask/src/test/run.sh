#!/bin/sh
# Tests the CUDA back end on this machine's GPU. Made by `cargo xtask test --backend cuda --archive`: needs the driver and
# NVRTC (a CUDA toolkit, or NVRTC_LIBRARY=PATH), but neither Rust nor a network.
#   sh run.sh [RESULTS]      the output of each step goes to a file in RESULTS (default: results, beside this file)
# Environment: ENGINES (default "w"), VMS and REQUESTS of the lockstep run (default 4 and 100), LIMIT (seconds for each
# step, default 600). The status is 0 if all passed.
set -u
here=$(cd "$(dirname "$0")" && pwd) || exit 2
results=${1:-$here/results}
mkdir -p "$results" || exit 2
failed=0

step() {
    name=$1
    shift
    begun=$(date +%s)
    timeout -k 5 "${LIMIT:-600}" "$@" >"$results/$name.txt" 2>&1
    status=$?
    count=$(sed -n 's/^test result: .* \([0-9]* passed; [0-9]* failed\).*/: \1/p' "$results/$name.txt")
    if [ $status -eq 0 ]; then
        echo "ok      $name$count ($(($(date +%s) - begun)) s)"
    elif [ $status -eq 124 ] || [ $status -eq 137 ]; then
        echo "FAILED  $name: not done after ${LIMIT:-600} s, and ended"
        tail -n 20 "$results/$name.txt" | sed 's/^/  | /'
        failed=$((failed + 1))
    else
        echo "FAILED  $name$count (status $status, $(($(date +%s) - begun)) s)"
        tail -n 20 "$results/$name.txt" | sed 's/^/  | /'
        failed=$((failed + 1))
    fi
    return $status
}

step gpus "$here/emulator" gpus || exit 1
for engine in ${ENGINES:-w}; do
    for test in "$here"/tests/*; do
        step "$engine-$(basename "$test")" env MACHINE_ENGINE="cuda-$engine" "$test"
    done
    [ -d "$here/guest" ] && step "$engine-lockstep" "$here/emulator" lockstep --image "$here/guest" \
        --vms "${VMS:-4}" --requests "${REQUESTS:-100}" --engine "$engine" --mismatch "$results/$engine-mismatch"
done
[ $failed -eq 0 ] && echo "all passed" || echo "$failed failed"
[ $failed -eq 0 ]
