#!/usr/bin/env python3
"""Tries pause, resume and reset on a fleet of real guests, and prints what it saw as JSON.

    bench/control.py IMAGE-DIR EMULATOR [--backend cuda|cpu] [--vms 8] [--port-base 4700] [--rounds 3]

It starts the fleet itself and needs nothing but Python. The status is 1 if something did not hold.
"""

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time


class Fleet:
    def __init__(self, wishes, folder):
        self.wishes, self.folder = wishes, folder
        self.common = ["--port-base", str(wishes.port_base), "--state-dir", folder]
        command = [wishes.emulator, "fleet", "--image", wishes.image, "--backend", wishes.backend, "--quiet"]
        command += ["--vms", str(wishes.vms), "--web", str(wishes.port_base - 1)] + self.common
        self.log = open(os.path.join(folder, "log"), "w+")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)

    def end(self):
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=30)

    def tell(self, *words):
        subprocess.run([self.wishes.emulator, words[0], *self.common, *words[1:]], check=True, stdout=subprocess.DEVNULL)

    def api(self, path, method="GET"):
        link = http.client.HTTPConnection("127.0.0.1", self.wishes.port_base - 1, timeout=10)
        link.request(method, path)
        answer = link.getresponse()
        body = answer.read()
        link.close()
        if answer.status != 200:
            raise RuntimeError(f"{method} {path}: {answer.status} {body!r}")
        return json.loads(body)

    def vm(self, number):
        return self.api(f"/api/vms/{number}")

    def status(self):
        text = subprocess.run([self.wishes.emulator, "status", *self.common], check=True, capture_output=True).stdout
        return json.loads(text)

    def ready(self):
        states = self.api("/api/fleet")["totals"]["states"]
        return sum(states[name] for name in ("ready", "idle", "running"))

    def page(self, number, timeout=10.0):
        link = http.client.HTTPConnection("127.0.0.1", self.wishes.port_base + number, timeout=timeout)
        try:
            link.request("GET", "/", headers={"Connection": "close"})
            answer = link.getresponse()
            answer.read()
            return answer.status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            link.close()

    def type(self, number, text):
        """On the VM's console, which is a WebSocket: one masked binary message."""
        link = socket.create_connection(("127.0.0.1", self.wishes.port_base - 1), timeout=10)
        head = (
            f"GET /api/vms/{number}/console HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        link.sendall(head.encode())
        if b" 101 " not in link.recv(4096):
            raise RuntimeError("no console")
        link.sendall(bytes([0x82, 0x80 | len(text), 0, 0, 0, 0]) + text.encode())
        time.sleep(0.3)
        link.close()


def until(what, condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"not within {seconds} s: {what}")
        time.sleep(0.05)


def try_all(fleet, rounds):
    seen = {}
    last = fleet.wishes.vms - 1

    def hold(what, holds, *values):
        seen[what] = list(values)
        if not holds:
            seen.setdefault("broken", []).append(what)

    until("the page answers", lambda: fleet.process.poll() is None and answers(fleet))
    until("all VMs serve", lambda: all(fleet.page(n) == 200 for n in (0, 1, last)), 120)
    until("all VMs are ready", lambda: fleet.ready() == fleet.wishes.vms, 120)
    time.sleep(1.5)
    fresh = fleet.status()["vm"][1]["private_bytes"]

    # A VM that computes, and one that sleeps.
    fleet.type(1, "while :; do :; done\n")
    until("VM 1 computes", lambda: fleet.vm(1)["state"] == "running")
    fleet.tell("pause", "0-1")
    time.sleep(0.3)
    before = [fleet.status()["vm"][n] for n in (0, 1)]
    stuck = fleet.page(0, timeout=0.7)
    time.sleep(1.0)
    after = [fleet.status()["vm"][n] for n in (0, 1)]
    hold("states while paused", all(vm["state"] == "paused" for vm in after), *(vm["state"] for vm in after))
    states = [fleet.vm(n)["state"] for n in (0, 1)]
    hold("states in the API", states == ["paused", "paused"], *states)
    retired = [b["instructions"] - a["instructions"] for a, b in zip(before, after)]
    hold("instructions while paused", retired == [0, 0], *retired)
    hold("page of a paused VM", stuck is None, stuck)
    others = fleet.page(last)
    hold("page of another VM meanwhile", others == 200, others)
    fleet.tell("resume", "0-1")
    resumed = fleet.page(0)
    hold("page after resume", resumed == 200, resumed)
    time.sleep(0.5)
    more = fleet.status()["vm"][1]["instructions"] - after[1]["instructions"]
    hold("instructions after resume", more > 100_000, more)

    # RAM that a guest has written comes back. Resets of VMs that compute, sleep, and are paused.
    fleet.type(2, "dd if=/dev/zero of=/tmp/x bs=4096 count=400\n")
    until("VM 2 has written", lambda: fleet.status()["vm"][2]["private_bytes"] > fresh + 1_000_000)
    written = fleet.status()["vm"][2]["private_bytes"]
    fleet.tell("pause", "0")
    fleet.tell("reset", "0-2")
    until("they have started over", lambda: all(fleet.vm(n)["reboots"] == 1 for n in range(3)))
    until("they serve again", lambda: all(fleet.page(n) == 200 for n in range(3)))
    time.sleep(1.5)
    now = [fleet.status()["vm"][n] for n in range(3)]
    bytes_now = [vm["private_bytes"] for vm in now]
    hold("private bytes: fresh, written, after reset", all(b < fresh + 500_000 for b in bytes_now), fresh, written, *bytes_now)
    hold("states after reset", all(vm["state"] == "sleeping" for vm in now), *(vm["state"] for vm in now))

    # All of them, again and again, under load: nothing is lost on the way.
    total = fleet.api("/api/fleet")["totals"]["private_bytes"]
    load = [fleet.wishes.emulator, "load", "--port-base", str(fleet.wishes.port_base), "--vms", str(fleet.wishes.vms)]
    load = subprocess.Popen(load + ["--seconds", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for n in range(rounds):
            fleet.tell("reset", "all")
            until("all are ready again", lambda: all(vm["reboots"] >= n + 1 for vm in fleet.status()["vm"])
                  and fleet.ready() == fleet.wishes.vms, 120)
    finally:
        load.kill()
        load.wait()
    until("all serve", lambda: all(fleet.page(n) == 200 for n in range(min(fleet.wishes.vms, 32))))
    time.sleep(2)
    later = fleet.api("/api/fleet")["totals"]["private_bytes"]
    hold("private bytes of all, before and after the rounds", later < total * 1.1, total, later)
    failed = fleet.api("/api/fleet")["totals"]["states"].get("failed", 0)
    hold("failed VMs", failed == 0, failed)
    return seen


def answers(fleet):
    try:
        fleet.api("/api/fleet")
        return True
    except OSError:
        return False


def main():
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("image")
    words.add_argument("emulator")
    words.add_argument("--backend", default="cuda")
    words.add_argument("--vms", type=int, default=8)
    words.add_argument("--port-base", type=int, default=4700)
    words.add_argument("--rounds", type=int, default=3)
    wishes = words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(wishes, folder)
        try:
            seen = try_all(fleet, wishes.rounds)
        except Exception as error:  # whatever it was, the fleet's own words belong to it
            fleet.log.seek(0)
            seen = {"broken": [str(error)], "fleet": fleet.log.read()[-2000:]}
        seen["status"] = fleet.end()
    print(json.dumps(seen, indent=1))
    sys.exit(1 if "broken" in seen or seen["status"] != 0 else 0)


if __name__ == "__main__":
    main()
