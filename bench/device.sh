#!/bin/sh
# Runs the fleet and the benchmark on the GPUs of this machine:
#   bench/device.sh IMAGE-DIR EMULATOR OUTPUT-DIR [COMMIT]
# IMAGE-DIR holds Image, initrd.cpio, vm.dtb and manifest.json; EMULATOR is the binary of a release build. Reports,
# consoles and messages go to OUTPUT-DIR. What fails is told, and the rest is tried nevertheless; the status is then 1.
# Environment: SIZES (fleets, default "1 64 1024"), BENCH (sizes of the benchmark, default "1,64,256,1024,4096"; empty:
# none), MORE (further options for both, for instance "--gpu-registers 64"), LIMIT (seconds for each run, default 120).
set -u

if [ $# -lt 3 ]; then
    echo "usage: $0 IMAGE-DIR EMULATOR OUTPUT-DIR [COMMIT]" >&2
    exit 2
fi
image=$1 emulator=$2 out=$3 commit=${4:-}
mkdir -p "$out" || exit 2
status=0

nvidia-smi --query-gpu=name,driver_version,memory.total,memory.free --format=csv || echo "no nvidia-smi" >&2

for vms in ${SIZES-1 64 1024}; do
    echo "== fleet of $vms"
    state=$out/state-$vms
    # MORE is a list of words.
    # shellcheck disable=SC2086
    timeout "$((${LIMIT:-120} + 20))" "$emulator" fleet --image "$image" --backend cuda --vms "$vms" --until http \
        --timeout "${LIMIT:-120}" --state-dir "$state" --report "$out/fleet-$vms.json" ${MORE-} \
        >"$out/fleet-$vms.txt" 2>&1 || { echo "failed with status $?"; status=1; }
    tail -n 40 "$out/fleet-$vms.txt"
    # The fleet's own words in full; of the consoles the first, which is enough to see how far guests come.
    first=$(find "$state" -type f -name '*0*' | sort | head -n 1)
    if [ "$status" -ne 0 ] && [ -n "$first" ]; then
        echo "-- $first"
        tail -n 25 "$first"
    fi
    [ "$vms" -gt 64 ] && rm -rf "$state"
    [ -f "$out/fleet-$vms.json" ] && cat "$out/fleet-$vms.json"
done

if [ -n "${BENCH-1,64,256,1024,4096}" ]; then
    echo "== benchmark"
    # shellcheck disable=SC2086
    "$emulator" bench --image "$image" --backend cuda --vms "${BENCH-1,64,256,1024,4096}" --timeout "${LIMIT:-120}" \
        --json "$out/bench.json" ${commit:+--commit "$commit"} ${MORE-} 2>&1 | tee "$out/bench.txt"
    [ -f "$out/bench.json" ] || status=1
fi
exit $status
