#!/usr/bin/env python3
"""What well-behaved streams feel of a flood of refused clients: the 99th percentile between their tokens.

  cargo build --release -p gateway -p gateway-bench
  sudo bench/flood-beside.py [--streams 200] [--seconds 5] [--rounds 3] [--build target/release]

Turns, each with a gateway of its own:

- none       no flood.
- elsewhere  the flood knocks at a port where nobody listens: it takes the same CPU, none of it the gateway's. What this turn
             is worse than `none` is the machine's, which has only so many cores.
- dropped    the flood knocks at the gateway, and the kernel drops it.
- answered   the same with the kernel plane off: each connection is answered 401.

127.0.0.2 floods: processes that connect, ask with a wrong key and go, each as fast as it can. 127.0.0.1 has the streams, which
begin spread over a second; what is measured begins when all run. The flood has CPU 1 for itself; gateway, load generator and
simulated fleet share CPU 0. On loopback the kernel handles a SYN on the CPU that sent it: the drop's own cost falls on the
flood, as it would fall on the CPU that serves the network card's queue.

Needs root (BPF), python3, two cores. Prints JSON; progress goes to standard error.
"""

import argparse
import hashlib
import json
import mmap
import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request

KEY = "sk-bench-flood"
FLOOD = "127.0.0.2"
KINDS = ("none", "elsewhere", "dropped", "answered")
# Between the moment when all streams run and the measured window, seconds: the flood is on its feet then.
SETTLE_S = 1
RAMP_S = 1
TOKENS_PER_S = 50


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def config(directory, ports, tokens, drop):
    sha = hashlib.sha256(KEY.encode()).hexdigest()
    front, admin, upstream, _ = ports
    mode = "required" if drop else '"off"'
    model = f"sim:tokens={tokens},pace={1000 // TOKENS_PER_S}ms,first=0,stamp"
    return f"""
listeners: [{{ address: "127.0.0.1:{front}" }}]
admin: {{ address: "127.0.0.1:{admin}", token: bench-flood }}
providers: {{ sim: {{ kind: openai, endpoints: ["http://127.0.0.1:{upstream}"] }} }}
models: [{{ name: fast, targets: [{{ provider: sim, model: "{model}" }}] }}]
keys: [{{ name: bench, sha256: {sha} }}]
limits: [{{ requests: 1000000, every: 1m }}]
kernel: {{ mode: {mode}, drop: {{ after_refusals: 20, within: 10s, for: 1h }} }}
workers: {{ threads: 1, pin: false }}
ledger: {{ path: {directory}/state }}
log: {{ level: error, access: "off" }}
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


class Flood:
    """Processes that knock until they are ended. Counts are in memory that they share with this one."""

    def __init__(self, port, knockers):
        self.shared = mmap.mmap(-1, 16 * knockers)
        self.pids = []
        for place in range(knockers):
            pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                try:
                    os.sched_setaffinity(0, {1})
                    knock(port, self.shared, 16 * place)
                finally:
                    os._exit(1)
            self.pids.append(pid)

    def counts(self):
        """Connections tried, and those that were answered."""
        words = struct.unpack(f"{2 * len(self.pids)}Q", self.shared[:])
        return sum(words[::2]), sum(words[1::2])

    def end(self):
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def knock(port, shared, at):
    body = b'{"model":"fast","messages":[]}'
    asked = (b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer wrong\r\n"
             b"content-length: " + str(len(body)).encode() + b"\r\n\r\n" + body)
    server, source, reset = ("127.0.0.1", port), (FLOOD, 0), b"\1\0\0\0\0\0\0\0"
    tries = answers = 0
    while True:
        tries += 1
        client = socket.socket()
        client.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
        client.bind(source)
        if client.connect_ex(server) == 0:
            try:
                # Reset at the end: nothing is left in TIME_WAIT, whose ports would run out.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                client.sendall(asked)
                answers += bool(client.recv(4096))
            except OSError:
                pass
        client.close()
        struct.pack_into("2Q", shared, at, tries, answers)


def cpu_s(pid):
    """CPU time of all threads of a process."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{task}/schedstat") as file:
                total += int(file.read().split()[0])
        except OSError:
            pass
    return total / 1e9


def dropped(admin):
    request = urllib.request.Request(f"http://127.0.0.1:{admin}/kernel", headers={"authorization": "Bearer bench-flood"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer).get("dropped", 0)


def end(process):
    """Streams are over; should one not be, the gateway would wait for it, and the next turn for the gateway."""
    process.terminate()
    try:
        process.wait(timeout=3)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def turn(arguments, kind):
    with tempfile.TemporaryDirectory(prefix="gateway-flood-") as directory:
        ports = front, admin, upstream, nobody = [free_port() for _ in range(4)]
        tokens = (RAMP_S + SETTLE_S + arguments.seconds) * TOKENS_PER_S
        path = f"{directory}/gateway.yaml"
        with open(path, "w") as file:
            file.write(config(directory, ports, tokens, kind == "dropped"))
        fleet = gateway = load = flood = None
        try:
            fleet = subprocess.Popen([f"{arguments.build}/gateway-bench", "upstream", "--listen", f"127.0.0.1:{upstream}"],
                                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            gateway = subprocess.Popen([f"{arguments.build}/gateway", "run", "-c", path])
            wait_for(upstream, fleet)
            wait_for(front, gateway)
            if kind != "none":
                flood = Flood(nobody if kind == "elsewhere" else front, arguments.knockers)
            result = f"{directory}/load.json"
            load = subprocess.Popen(
                [f"{arguments.build}/gateway-bench", "load", "--url", f"http://127.0.0.1:{front}/v1/chat/completions",
                   "--key", KEY, "--model", "fast", "--stream", "-c", str(arguments.streams), "-n", str(arguments.streams),
                   "--ramp", f"{RAMP_S}s", "--warm-up", f"{RAMP_S + SETTLE_S}s", "--expect-tokens", str(tokens),
                   "--json", result], stdout=subprocess.DEVNULL)
            time.sleep(RAMP_S + SETTLE_S)
            begun, used, before = time.monotonic(), cpu_s(gateway.pid), flood.counts() if flood else (0, 0)
            time.sleep(arguments.seconds)
            took, used = time.monotonic() - begun, cpu_s(gateway.pid) - used
            tries, answers = (now - then for now, then in zip(flood.counts() if flood else (0, 0), before))
            if load.wait(timeout=60) != 0:
                sys.exit(f"{kind}: not every stream was whole")
            refused = dropped(admin) if kind == "dropped" else 0
            with open(result) as file:
                report = json.load(file)
            row = {
                "inter_token_p99_us": report["inter_token"]["p99_us"], "delay_p99_us": report["delay"]["p99_us"],
                "delay_p50_us": report["delay"]["p50_us"], "flood_per_s": round(tries / took),
                "answered_per_s": round(answers / took), "gateway_cores": round(used / took, 3),
            }
            if kind == "dropped" and refused < tries * 0.99:
                sys.exit(f"the kernel dropped {refused} of {tries} connections")
            return row
        finally:
            if flood:
                flood.end()
            for process in (load, gateway, fleet):
                if process:
                    end(process)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default=os.path.join(os.path.dirname(__file__), "../target/release"))
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=5, help="measured in each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--knockers", type=int, default=32, help="processes that flood")
    arguments = parser.parse_args()
    if os.cpu_count() < 2:
        sys.exit("needs two cores")
    # Ends as an exception does, so that what was started goes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    os.sched_setaffinity(0, {0})
    turns = {kind: [] for kind in KINDS}
    for number in range(arguments.rounds):
        for kind in KINDS:
            row = turn(arguments, kind)
            turns[kind].append(row)
            print(f"{number + 1}/{arguments.rounds} {kind}: {row}", file=sys.stderr)
    median = {kind: {name: statistics.median(row[name] for row in rows) for name in rows[0]} for kind, rows in turns.items()}
    ratios = {}
    for name in ("inter_token_p99_us", "delay_p99_us"):
        for kind, base in (("elsewhere", "none"), ("dropped", "none"), ("dropped", "elsewhere"), ("answered", "none")):
            pairs = [flooded[name] / max(calm[name], 1) for flooded, calm in zip(turns[kind], turns[base])]
            ratios[f"{name}: {kind} / {base}"] = [round(f(pairs), 3) for f in (statistics.median, min, max)]
    print(json.dumps({"median": median, "ratio_median_min_max": ratios, "aim": "inter_token_p99_us: dropped / none at most 1.1"}, indent=1))


if __name__ == "__main__":
    main()
