#!/bin/sh
# Measures the network of a fleet, with a load generator on the same machine:
#   bench/network.sh IMAGE-DIR EMULATOR OUTPUT-DIR [BACKEND]
# IMAGE-DIR holds Image, initrd.cpio, vm.dtb and manifest.json; EMULATOR is the binary of a release build; BACKEND is cuda,
# cpu or stub (no guests: the bridge alone), by default cuda. Each measurement's JSON goes to OUTPUT-DIR and is printed.
# Environment: VMS (default 1024), NETS (default "user"; "user tun" as root), CONNECTIONS (default "256 1024"), THREADS (of
# the load generator, default 4), SPAN (seconds for each measurement, default 10), LIMIT (seconds for the boot, default 120),
# MORE (further options of the fleet).
set -u

if [ $# -lt 3 ]; then
    echo "usage: $0 IMAGE-DIR EMULATOR OUTPUT-DIR [cuda|cpu|stub]" >&2
    exit 2
fi
image=$1 emulator=$2 out=$3 backend=${4:-cuda}
vms=${VMS:-1024} threads=${THREADS:-4} span=${SPAN:-10} base=${PORT_BASE:-4000}
mkdir -p "$out" || exit 2
status=0
fleet=

trap '[ -n "$fleet" ] && kill "$fleet" 2>/dev/null' EXIT

# measure NAME OPTIONS...: one measurement; one that fails is told, and the rest goes on.
measure() {
    name=$out/$backend-$vms-$net-$1.json
    shift
    "$emulator" load --port-base "$base" --vms "$vms" --threads "$threads" --seconds "$span" "$@" >"$name" || status=1
    echo "== $name: $*"
    cat "$name"
}

for net in ${NETS:-user}; do
    # MORE is a list of words.
    # shellcheck disable=SC2086
    "$emulator" fleet --image "$image" --backend "$backend" --vms "$vms" --net "$net" --port-base "$base" --quiet \
        --state-dir "$out/state" ${MORE-} >"$out/fleet-$net.txt" 2>&1 &
    fleet=$!
    waited=0
    # Each VM once.
    until "$emulator" load --port-base "$base" --vms "$vms" --connections "$vms" --seconds 0.001 >/dev/null 2>&1; do
        waited=$((waited + 1))
        if [ "$waited" -gt "${LIMIT:-120}" ] || ! kill -0 "$fleet" 2>/dev/null; then
            echo "the fleet does not answer:" >&2
            tail -n 20 "$out/fleet-$net.txt" >&2
            exit 1
        fi
        sleep 1
    done
    # All pages once a second, as the page's grid fetches them.
    measure grid --connections "$vms" --rate "$vms"
    for connections in ${CONNECTIONS:-256 1024}; do
        measure "$connections-kept" --connections "$connections" --keep-alive
        measure "$connections-new" --connections "$connections"
    done
    if [ "$net" = tun ]; then
        measure direct --connections 256 --direct
        if command -v ping >/dev/null; then
            ping -q -i 0.02 -c 200 10.77.0.2 | tail -n 2 | tee "$out/$backend-$vms-tun-ping.txt"
        fi
    fi
    kill -INT "$fleet"
    wait "$fleet"
    fleet=
done
exit "$status"
