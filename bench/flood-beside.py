#!/usr/bin/env python3
"""What well-behaved streams feel of a flood of refused clients: the 99th percentile between their tokens, by turns with no
flood, with a flood that the kernel drops, and with the same flood answered by the gateway (drop off).

  cargo build --release -p gateway -p gateway-bench
  sudo bench/flood-beside.py [--streams 200] [--seconds 5] [--rounds 3] [--rate 0] [--build target/release]

Needs root (BPF) and python3. 127.0.0.2 floods with connections that ask with a wrong key; 127.0.0.1 has the streams. The
gateway has CPU 0 for itself; streams, simulated fleet and flood share CPU 1, so the flood is as fast as they leave room for
(--rate bounds it, connections a second). Each turn starts a gateway of its own. Prints JSON.
"""

import argparse
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

KEY = "sk-bench-flood"
FLOOD = "127.0.0.2"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def config(directory, front, admin, upstream, drop):
    sha = hashlib.sha256(KEY.encode()).hexdigest()
    mode = "required" if drop else '"off"'
    return f"""
listeners: [{{ address: "127.0.0.1:{front}" }}]
admin: {{ address: "127.0.0.1:{admin}", token: bench-flood }}
providers: {{ sim: {{ kind: openai, endpoints: ["http://127.0.0.1:{upstream}"] }} }}
models: [{{ name: fast, targets: [{{ provider: sim, model: "sim:tokens=100000,pace=20ms,first=0" }}] }}]
keys: [{{ name: bench, sha256: {sha} }}]
limits: [{{ requests: 1000000, every: 1m }}]
kernel: {{ mode: {mode}, drop: {{ after_refusals: 20, within: 10s, for: 1h }} }}
workers: {{ threads: 1, pin: false }}
ledger: {{ path: {directory}/state }}
log: {{ level: warn, access: "off" }}
"""


def wait_for(port, process):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    sys.exit("a server did not start (root? BPF?)")


class Flood(threading.Thread):
    """Connects, asks with a wrong key, goes: until told to stop."""

    def __init__(self, port, rate):
        super().__init__(daemon=True)
        self.port, self.rate, self.stop, self.tries, self.answers = port, rate, False, 0, 0

    def run(self):
        body = b'{"model":"fast","messages":[]}'
        asked = (b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer wrong\r\n"
                 b"content-length: " + str(len(body)).encode() + b"\r\n\r\n" + body)
        begun = time.monotonic()
        while not self.stop:
            if self.rate and self.tries > (time.monotonic() - begun) * self.rate:
                time.sleep(0.001)
                continue
            self.tries += 1
            client = socket.socket()
            try:
                client.settimeout(1)
                client.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                client.bind((FLOOD, 0))
                client.connect(("127.0.0.1", self.port))
                client.sendall(asked)
                self.answers += bool(client.recv(4096))
            except OSError:
                pass
            finally:
                client.close()


def turn(arguments, kind):
    with tempfile.TemporaryDirectory(prefix="gateway-flood-") as directory:
        front, admin, upstream = free_port(), free_port(), free_port()
        path = f"{directory}/gateway.yaml"
        with open(path, "w") as file:
            file.write(config(directory, front, admin, upstream, kind == "dropped"))
        on = lambda cpu, *command: ["taskset", "-c", str(cpu), *command]
        fleet = subprocess.Popen(on(1, f"{arguments.build}/gateway-bench", "upstream", "--listen", f"127.0.0.1:{upstream}"),
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        gateway = subprocess.Popen(on(0, f"{arguments.build}/gateway", "run", "-c", path), stderr=subprocess.DEVNULL)
        flood = None
        try:
            wait_for(upstream, fleet)
            wait_for(front, gateway)
            if kind != "none":
                flood = Flood(front, arguments.rate)
                flood.start()
                time.sleep(1)
            result = f"{directory}/load.json"
            tries = flood.tries if flood else 0
            subprocess.run(on(1, f"{arguments.build}/gateway-bench", "load", "--url", f"http://127.0.0.1:{front}/v1/chat/completions",
                              "--key", KEY, "--model", "fast", "--stream", "-c", str(arguments.streams), "--warm-up", "2s",
                              "-d", f"{arguments.seconds}s", "--pid", str(gateway.pid), "--json", result),
                           check=True, stdout=subprocess.DEVNULL)
            with open(result) as file:
                report = json.load(file)
            rate = (flood.tries - tries) / (arguments.seconds + 2) if flood else 0
            return report, rate, flood.answers if flood else 0
        finally:
            if flood:
                flood.stop = True
                flood.join(3)
            for process in (gateway, fleet):
                process.terminate()
                process.wait(timeout=60)


def find(report, *names):
    """The first value below one of these names, wherever it stands."""
    if isinstance(report, dict):
        for name in names:
            if name in report:
                return report[name]
        report = list(report.values())
    for part in report if isinstance(report, list) else []:
        found = find(part, *names)
        if found is not None:
            return found
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default=os.path.join(os.path.dirname(__file__), "../target/release"))
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=int, default=0)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {1})
    figures = {kind: {"p99_us": [], "flood_per_s": [], "answered": []} for kind in ("none", "dropped", "answered")}
    for _ in range(arguments.rounds):
        for kind, rows in figures.items():
            report, rate, answers = turn(arguments, kind)
            between = find(report, "inter_token_us", "inter_token", "inter_token_ms")
            rows["p99_us"].append(find(between, "p99"))
            rows["flood_per_s"].append(round(rate))
            rows["answered"].append(answers)
    for rows in figures.values():
        rows["p99_us_median"] = statistics.median(rows["p99_us"])
    base = figures["none"]["p99_us_median"]
    figures["ratio_dropped"] = round(figures["dropped"]["p99_us_median"] / base, 3)
    figures["ratio_answered"] = round(figures["answered"]["p99_us_median"] / base, 3)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
