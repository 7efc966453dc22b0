#!/usr/bin/env python3
"""What the gateway's eBPF programs cost: nanoseconds a run, and for `connections` nanoseconds a connection.

  cargo build --release -p gateway
  sudo bench/program-cost.py [--count 20000] [--rounds 5] [--gateway target/release/gateway]

Counted by the kernel's own run-time statistics (BPF_ENABLE_STATS, 5.8), which read the clock twice a run. What that costs
is counted too: empty programs of the same types run beside the gateway's, on the same cgroup for the same events
(`connections`) and on a listener of this script's (`listener`). Both figures are told: as counted, and less the empty
program's.

Rounds of two turns: nobody is blocked; then one client is, and every other connection attempt is its. The others are served: each
connection is of one of 1000 addresses, asks for /v1/models with a key, is answered, and ended by the gateway. Only the
gateway is in the cgroup, so its side of the connections alone is counted. It has CPU 0, this script CPU 1.

Needs root (BPF), bpftool, cgroup2, two cores. Prints JSON.
"""

import argparse
import ctypes
import hashlib
import json
import os
import platform
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request

KEY = "sk-bench-cost"
BLOCKED = "127.0.0.2"
CLIENTS = 1000

# bpf(2): commands, program types, the attach type (include/uapi/linux/bpf.h); the socket option (asm-generic/socket.h).
SYSCALL = {"x86_64": 321, "aarch64": 280}.get(platform.machine())
PROG_LOAD, PROG_ATTACH, ENABLE_STATS = 5, 8, 32
SOCK_OPS, SK_REUSEPORT = 13, 21
CGROUP_SOCK_OPS, ALLOW_MULTI = 3, 2
SO_ATTACH_REUSEPORT_EBPF = 52


def bpf(command, attributes):
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(SYSCALL, command, ctypes.byref(buffer), len(attributes))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"bpf({command}): {os.strerror(code)}")
    return result


def empty_program(kind, name):
    """`r0 = 1; exit`, which lets everything through."""
    code = ctypes.create_string_buffer(struct.pack("<BBhi", 0xb7, 0, 0, 1) + struct.pack("<BBhi", 0x95, 0, 0, 0))
    licence = ctypes.create_string_buffer(b"GPL")
    return bpf(PROG_LOAD, struct.pack("<IIQQIIQII16s", kind, 2, ctypes.addressof(code), ctypes.addressof(licence), 0, 0, 0, 0, 0,
                                      name.encode()))


def programs():
    """Run time and runs of every program, by id, with its name."""
    listed = json.loads(subprocess.run(["bpftool", "prog", "show", "-j"], capture_output=True, check=True).stdout)
    return {p["id"]: (p.get("name"), p.get("run_time_ns", 0), p.get("run_cnt", 0)) for p in listed}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def config(directory, front, admin):
    sha = hashlib.sha256(KEY.encode()).hexdigest()
    return f"""
listeners: [{{ address: "127.0.0.1:{front}" }}]
admin: {{ address: "127.0.0.1:{admin}", token: bench-cost }}
providers: {{ sim: {{ kind: openai, endpoints: ["http://127.0.0.1:9"] }} }}
models: [{{ name: fast, targets: [{{ provider: sim }}] }}]
keys: [{{ name: bench, sha256: {sha} }}]
kernel: {{ mode: required }}
workers: {{ threads: 1, pin: false }}
ledger: {{ path: {directory}/state }}
log: {{ level: error, access: "off" }}
"""


def cgroup_root():
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            if " - cgroup2 " in line:
                return line.split()[4]
    sys.exit("no cgroup2 is mounted")


class Gateway:
    def __init__(self, binary):
        self.cgroup = f"{cgroup_root()}/gateway-cost-{os.getpid()}"
        self.process = None
        self.state = tempfile.TemporaryDirectory(prefix="gateway-cost-")
        os.mkdir(self.cgroup)
        try:
            self.start(binary)
        except BaseException:
            self.end()
            raise

    def start(self, binary):
        self.front, self.admin = free_port(), free_port()
        path = f"{self.state.name}/gateway.yaml"
        with open(path, "w") as file:
            file.write(config(self.state.name, self.front, self.admin))

        def enter():
            with open(f"{self.cgroup}/cgroup.procs", "w") as file:
                file.write("0")
            os.sched_setaffinity(0, {0})

        self.process = subprocess.Popen([binary, "run", "-c", path], preexec_fn=enter)
        deadline = time.monotonic() + 30
        while True:
            try:
                self.ask("GET", "/healthz")
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    sys.exit("the gateway did not start (root? BPF?)")
                time.sleep(0.05)

    def ask(self, method, path, body=None):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.admin}{path}", method=method, data=None if body is None else json.dumps(body).encode(),
            headers={"authorization": "Bearer bench-cost"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read()

    def end(self):
        if self.process:
            self.process.terminate()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        os.rmdir(self.cgroup)
        self.state.cleanup()


def connection(source):
    client = socket.socket()
    client.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
    client.bind((source, 0))
    return client


def served(port, number):
    client = connection(f"127.1.{number % CLIENTS // 250}.{1 + number % 250}")
    client.connect(("127.0.0.1", port))
    client.sendall(b"GET /v1/models HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer " + KEY.encode() + b"\r\nconnection: close\r\n\r\n")
    answer = client.recv(4096)
    if not answer.startswith(b"HTTP/1.1 200"):
        sys.exit(f"not served: {answer[:80]!r}")
    while client.recv(4096):
        pass
    client.close()


def turn(port, count, blocked):
    """Connects; what each program of a name ran for meanwhile: nanoseconds, runs."""
    before = programs()
    for number in range(count):
        served(port, number)
        if blocked:
            client = connection(BLOCKED)
            if client.connect_ex(("127.0.0.1", port)) == 0:
                sys.exit("connected where it must not")
            client.close()
    # The last connections' ends.
    time.sleep(0.2)
    ran = {}
    for id, (name, time_ns, runs) in programs().items():
        _, time_before, runs_before = before.get(id, (name, 0, 0))
        if runs > runs_before:
            known = ran.get(name, (0, 0))
            ran[name] = (known[0] + time_ns - time_before, known[1] + runs - runs_before)
    return ran


def row(ran, count, floor_port):
    ops, empty, listener = ran["connections"], ran["empty_ops"], ran["listener"]
    return {
        "listener_ns": listener[0] / listener[1], "listener_less_empty_ns": listener[0] / listener[1] - floor_port,
        "connections_runs": ops[1] / count, "connections_ns": ops[0] / ops[1], "empty_ns": empty[0] / empty[1],
        "connection_ns": ops[0] / count, "connection_less_empty_ns": (ops[0] - empty[0]) / count,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gateway", default=os.path.join(os.path.dirname(__file__), "../target/release/gateway"))
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    # Ends as an exception does, so that gateway and cgroup go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    os.sched_setaffinity(0, {1})
    gateway = Gateway(options.gateway)
    try:
        # Statistics are on as long as this descriptor is open; the type is BPF_STATS_RUN_TIME.
        stats = bpf(ENABLE_STATS, struct.pack("<I", 0))
        directory = os.open(gateway.cgroup, os.O_RDONLY)
        empty = empty_program(SOCK_OPS, "empty_ops")
        bpf(PROG_ATTACH, struct.pack("<IIIII", directory, empty, CGROUP_SOCK_OPS, ALLOW_MULTI, 0))
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_EBPF, empty_program(SK_REUSEPORT, "empty_port"))
        turns = {"nobody blocked": [], "one blocked": []}
        floors = []
        for number in range(options.rounds):
            before = programs()
            for _ in range(2000):
                client = connection("127.0.0.1")
                client.connect(listener.getsockname())
                listener.accept()[0].close()
                client.close()
            floor = [(ns - before[id][1], runs - before[id][2]) for id, (name, ns, runs) in programs().items() if name == "empty_port"]
            floors.append(sum(ns for ns, _ in floor) / sum(runs for _, runs in floor))
            for kind, rows in turns.items():
                if kind == "one blocked":
                    gateway.ask("POST", "/kernel/block", {"client": BLOCKED, "for": "1h"})
                rows.append(row(turn(gateway.front, options.count, kind == "one blocked"), options.count, floors[-1]))
                print(f"{number + 1}/{options.rounds} {kind}: { {name: round(value) for name, value in rows[-1].items()} }", file=sys.stderr)
            gateway.ask("POST", "/kernel/unblock", {"client": BLOCKED})
        result = {kind: {name: round(statistics.median(row[name] for row in rows), 1) for name in rows[0]} for kind, rows in turns.items()}
        result["empty_port_ns"] = round(statistics.median(floors), 1)
        result["aims"] = {"listener_ns": 300, "connection_ns": 1000}
        print(json.dumps(result, indent=1))
        os.close(stats)
        os.close(directory)
    finally:
        gateway.end()


if __name__ == "__main__":
    main()
