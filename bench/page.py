#!/usr/bin/env python3
"""Opens the page of a running fleet as a browser does, and says how many VMs' pages are fetched each second.

    bench/page.py [--address 127.0.0.1:8080] [--seconds 60]

It needs nothing but Python. A beat is missed if fewer pages were fetched in a second than there are VMs.
"""

import argparse
import base64
import json
import os
import socket
import struct
import time


def connect(address):
    host, port = address.rsplit(":", 1)
    link = socket.create_connection((host, int(port)), timeout=10)
    key = base64.b64encode(os.urandom(16)).decode()
    head = (
        f"GET /api/live HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
    )
    link.sendall(head.encode())
    stream = link.makefile("rb")
    status = stream.readline().decode()
    if " 101 " not in status:
        raise SystemExit(f"{address}: {status.strip()}")
    while stream.readline().strip():
        pass
    return link, stream


def messages(stream):
    """Whole text and binary messages; servers don't mask, and ours does not split."""
    while True:
        first, length = stream.read(2)
        if length == 126:
            (length,) = struct.unpack(">H", stream.read(2))
        elif length == 127:
            (length,) = struct.unpack(">Q", stream.read(8))
        yield first & 15, stream.read(length)


def main():
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--address", default="127.0.0.1:8080")
    words.add_argument("--seconds", type=float, default=60)
    wishes = words.parse_args()
    link, stream = connect(wishes.address)
    vms, beats, millis, begin = None, [], {}, None
    for kind, body in messages(stream):
        if kind == 2:
            for at in range(0, len(body), 20):
                vm, _, page, took = struct.unpack_from("<IBBH", body, at)
                millis[vm] = took if page == 1 else None
        elif kind == 1:
            news = json.loads(body)
            vms = news["hello"]["vms"] if "hello" in news else vms
            if "totals" in news:
                # The fetching begins with this connection; the first seconds are not whole.
                begin = begin or time.monotonic()
                if time.monotonic() - begin > 3:
                    beats.append(news["totals"]["pages"])
                if time.monotonic() - begin > wishes.seconds + 3:
                    break
    link.close()
    beats.sort()
    took = sorted(value for value in millis.values() if value is not None)
    print(json.dumps({
        "vms": vms,
        "seconds": len(beats),
        "pages_per_second": {"min": beats[0], "median": beats[len(beats) // 2], "max": beats[-1]},
        "missed": sum(beat < vms for beat in beats),
        "answering": len(took),
        "milliseconds": {"median": took[len(took) // 2], "max": took[-1]} if took else None,
    }))


if __name__ == "__main__":
    main()
