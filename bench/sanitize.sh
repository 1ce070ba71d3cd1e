#!/bin/sh
# Runs a short boot of 2 VMs under compute-sanitizer, on a machine with a GPU and the CUDA toolkit:
#   bench/sanitize.sh IMAGE-DIR EMULATOR OUTPUT-DIR
# IMAGE-DIR holds Image, initrd.cpio, vm.dtb and manifest.json; EMULATOR is the binary of a release build. Each tool's
# words go to OUTPUT-DIR; the status is 0 if all of them found nothing.
# Environment: TOOLS (default "memcheck racecheck synccheck"), VMS (default 2), STEPS of each VM (default 400000; a tool
# makes the kernels 10 to 100 times slower), ENGINES (default "w"), LIMIT (seconds for each run, default 300), SANITIZER
# (the program, default compute-sanitizer of PATH or /usr/local/cuda/bin).
set -u

if [ $# -ne 3 ]; then
    echo "usage: $0 IMAGE-DIR EMULATOR OUTPUT-DIR" >&2
    exit 2
fi
image=$1 emulator=$2 out=$3
mkdir -p "$out" || exit 2
sanitizer=${SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
if [ ! -x "$sanitizer" ]; then
    echo "$sanitizer is not there: it comes with the CUDA toolkit; SANITIZER names another place" >&2
    exit 2
fi
status=0
for engine in ${ENGINES:-w}; do
    for tool in ${TOOLS:-memcheck racecheck synccheck}; do
        log=$out/$engine-$tool.txt
        begun=$(date +%s)
        # Lockstep without requests: so many steps, compared with the CPU's at the end.
        timeout -k 5 "${LIMIT:-300}" "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 \
            "$emulator" lockstep --image "$image" --vms "${VMS:-2}" --steps "${STEPS:-400000}" --every 200000 \
            --requests 0 --engine "$engine" --mismatch "$out/$engine-$tool-mismatch" >"$log" 2>&1
        code=$?
        said=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -n 1 | sed 's/^=* *//')
        compared=$(grep -c 'states compared' "$log")
        if [ $code -eq 0 ] && [ "$compared" -eq 1 ] && [ -n "$said" ]; then
            echo "ok      $engine $tool: $said ($(($(date +%s) - begun)) s)"
        else
            echo "FAILED  $engine $tool: status $code; ${said:-no summary} ($(($(date +%s) - begun)) s); see $log"
            tail -n 15 "$log"
            status=1
        fi
    done
done
exit $status
