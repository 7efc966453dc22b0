#!/usr/bin/env python3
"""What refusing one connection costs: the kernel's drop against the 429 path, plain and under TLS, in one run.

  cargo build --release -p gateway -p gateway-bench
  sudo bench/refusal.py [--count 20000] [--tls-count 2000] [--gateway target/release/gateway]

Needs root (BPF), python3, openssl. It starts a gateway of its own on loopback, and lets 127.0.0.2 be refused by it.

- 429 path: CPU time of the gateway's process (all threads, /proc/PID/task/*/schedstat, nanoseconds) for each connection that
  is opened, refused by a limit with 429, and closed.
- Kernel drop: nobody's process. On loopback the kernel handles a SYN in the context of the process that sent it, so the cost
  is the CPU time of this client for a connect() that is dropped, less that for a connect() to a port where nobody listens
  (both end in a reset), plus what the gateway's process used meanwhile. Turns alternate, medians are compared, and what is
  measured is never taken for less than the program's own run time as the kernel counts it (bpf_stats_enabled).

- Bare SYNs: the same without this client's sockets. Another network namespace sends SYNs of a blocked client through a veth
  pair, as raw packets; the kernel handles them in the sender's time, so its CPU time for each, less that of sending alone (to
  a pair whose other end is down), is what receiving costs: at a port where nobody listens, dropped by `listener`, dropped by
  `driver` (XDP, native on veth). The first two send a reset, which is part of it.

Everything runs in a network namespace of its own. Prints JSON: nanoseconds each, ratios, and the aims (50 plain, 500 TLS).
"""

import argparse
import ctypes
import glob
import hashlib
import json
import os
import resource
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request

KEY = "sk-bench-refusal"
FLOOD = "127.0.0.2"
HERE, THERE, NOWHERE = "10.99.0.1", "10.99.0.2", "10.99.1.2"
CLONE_NEWNET = 0x40000000


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cpu_ns(pid):
    """CPU time of all threads of a process."""
    total = 0
    for path in glob.glob(f"/proc/{pid}/task/*/schedstat"):
        try:
            with open(path) as file:
                total += int(file.read().split()[0])
        except OSError:
            pass
    return total


def own_cpu_ns():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return int((usage.ru_utime + usage.ru_stime) * 1e9)


def config(directory, ports, limit, xdp):
    sha = hashlib.sha256(KEY.encode()).hexdigest()
    plain, tls, admin, dead = ports
    return f"""
listeners:
  - address: 0.0.0.0:{plain}
  - {{ address: "127.0.0.1:{tls}", tls: {{ certificate: {directory}/cert.pem, key: {directory}/key.pem }} }}
admin: {{ address: "127.0.0.1:{admin}", token: bench-refusal }}
providers: {{ sim: {{ kind: openai, endpoints: ["http://127.0.0.1:{dead}"] }} }}
models: [{{ name: fast, targets: [{{ provider: sim }}] }}]
keys: [{{ name: bench, sha256: {sha} }}]
limits: [{{ requests: 1, every: 1mo }}]
kernel: {{ mode: required, {xdp} drop: {{ after_refusals: {limit}, within: 1h, for: 1h }} }}
workers: {{ threads: 1, pin: false }}
ledger: {{ path: {directory}/state }}
log: {{ level: error, access: "off" }}
"""


class Gateway:
    def __init__(self, binary, xdp=""):
        self.process = None
        self.directory = tempfile.TemporaryDirectory(prefix="gateway-refusal-")
        try:
            self.start(binary, xdp)
        except BaseException:
            self.end()
            raise

    def start(self, binary, xdp):
        self.ports = [free_port() for _ in range(4)]
        path = self.directory.name
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
             "-subj", "/CN=localhost", "-keyout", f"{path}/key.pem", "-out", f"{path}/cert.pem"],
            check=True, stderr=subprocess.DEVNULL)
        with open(f"{path}/gateway.yaml", "w") as file:
            # Never blocked by itself: the block is made by hand when its turn comes.
            file.write(config(path, self.ports, 4_000_000, xdp))
        self.process = subprocess.Popen([binary, "run", "-c", f"{path}/gateway.yaml"])
        deadline = time.monotonic() + 30
        while True:
            try:
                self.admin("GET", "/healthz")
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    sys.exit("the gateway did not start (root? BPF?)")
                time.sleep(0.05)

    def admin(self, method, path, body=None):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports[2]}{path}", method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"authorization": "Bearer bench-refusal"})
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
        self.directory.cleanup()


def request():
    body = b'{"model":"fast","messages":[{"role":"user","content":"hello there"}]}'
    return (b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer " + KEY.encode()
            + b"\r\nconnection: close\r\ncontent-length: " + str(len(body)).encode() + b"\r\n\r\n" + body)


def connection():
    client = socket.socket()
    client.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
    client.bind((FLOOD, 0))
    return client


def refused(port, count, asked, context=None):
    """Connections that are answered 429; wrong answers end the run."""
    for turn in range(count):
        client = connection()
        client.connect(("127.0.0.1", port))
        if context:
            client = context.wrap_socket(client, server_hostname="localhost")
        client.sendall(asked)
        answer = client.recv(4096)
        if not answer.startswith(b"HTTP/1.1 429") and turn > 0:
            sys.exit(f"not a 429: {answer[:80]!r}")
        # Reset: nothing is left in TIME_WAIT, whose ports would run out.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()


def attempts(port, count):
    """CPU time of this process for each connect() that is reset."""
    before = own_cpu_ns()
    for _ in range(count):
        client = connection()
        if client.connect_ex(("127.0.0.1", port)) == 0:
            sys.exit("connected where it must not")
        client.close()
    return (own_cpu_ns() - before) / count


def program_ns():
    """Run time and runs of the listener's program, as the kernel counts them."""
    try:
        programs = json.loads(subprocess.run(["bpftool", "prog", "-j"], capture_output=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
    runs = [(p.get("run_time_ns", 0), p.get("run_cnt", 0)) for p in programs if p.get("type") == "sk_reuseport"]
    return (sum(r[0] for r in runs), sum(r[1] for r in runs)) if runs else None


def unshare():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        sys.exit(f"no network namespace: {os.strerror(ctypes.get_errno())}")


def ip(*words):
    subprocess.run(["ip", *words], check=True)


class Sender:
    """A process in another network namespace, which sends SYNs through a wire and tells its CPU time for each."""

    def __init__(self):
        orders, answers = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(orders[1])
                unshare()
                os.write(answers[1], b"\0" * 8)
                self.send(orders[0], answers[1])
            finally:
                os._exit(1)
        os.close(orders[0])
        self.orders, self.answers = orders[1], answers[0]
        os.read(self.answers, 8)
        ip("link", "add", "veth-here", "type", "veth", "peer", "name", "veth-there", "netns", str(self.pid))
        ip("addr", "add", f"{HERE}/24", "dev", "veth-here")
        ip("link", "set", "veth-here", "up")
        there = ["nsenter", f"--net=/proc/{self.pid}/ns/net", "ip"]
        for words in (f"addr add {THERE}/24 dev veth-there", "link set veth-there up",
                      "link add veth-dead type veth peer name veth-end", "addr add 10.99.1.1/24 dev veth-dead",
                      "link set veth-dead up", f"neigh add {NOWHERE} lladdr 02:00:00:00:00:01 dev veth-dead nud permanent"):
            subprocess.run([*there, *words.split()], check=True)
        # Addresses are resolved before anything is measured.
        self.cost(True, 9, 10)
        time.sleep(0.2)

    @staticmethod
    def send(orders, answers):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        while order := os.read(orders, 10):
            here, port, count = struct.unpack("=?xII", order)
            target = HERE if here else NOWHERE
            packet = syn(THERE, target, port)
            before = own_cpu_ns()
            for _ in range(count):
                raw.sendto(packet, (target, 0))
            os.write(answers, struct.pack("=Q", (own_cpu_ns() - before) // count))

    def cost(self, here, port, count):
        os.write(self.orders, struct.pack("=?xII", here, port, count))
        return struct.unpack("=Q", os.read(self.answers, 8))[0]

    def end(self):
        os.close(self.orders)
        os.waitpid(self.pid, 0)


def syn(source, target, port):
    """A SYN as an IPv4 packet; the kernel fills in the IP header's checksum."""
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    segment = struct.pack("!HHIIBBHHH", 40000, port, 1, 0, 0x50, 0x02, 0xffff, 0, 0)
    words = struct.unpack("!16H", ends + struct.pack("!HH", 6, len(segment)) + segment)
    total = sum(words)
    total = (total & 0xffff) + (total >> 16)
    total = ~((total & 0xffff) + (total >> 16)) & 0xffff
    head = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0x4000, 64, 6, 0)
    return head + ends + segment[:16] + struct.pack("!H", total) + segment[18:]


def bare(binary, sender, count):
    """Median nanoseconds to receive a SYN at a dead port, dropped by `listener`, and by XDP."""
    turns, costs = 10, {}
    for name, xdp in (("listener", ""), ("xdp", "xdp: { interface: veth-here, mode: native },")):
        gateway = Gateway(binary, xdp)
        try:
            plain, _, _, dead = gateway.ports
            gateway.admin("POST", "/kernel/block", {"client": THERE, "for": "1h"})
            rows = []
            for _ in range(turns):
                alone = sender.cost(False, plain, count // turns)
                closed = sender.cost(True, dead, count // turns)
                dropped = sender.cost(True, plain, count // turns)
                rows.append((alone, closed - alone, dropped - alone))
            kernel = json.loads(gateway.admin("GET", "/kernel"))
            counted = kernel["dropped" if name == "listener" else "xdp_dropped"]
            if counted < count // turns * turns:
                sys.exit(f"{name} dropped {counted} of {count}")
            alone, closed, dropped = (statistics.median(row[column] for row in rows) for column in range(3))
            costs |= {"send_ns": alone, "syn_nobody_listens_ns": closed} if name == "listener" else {}
            costs[f"syn_dropped_by_{name}_ns"] = dropped
        finally:
            gateway.end()
    return costs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gateway", default=os.path.join(os.path.dirname(__file__), "../target/release/gateway"))
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--tls-count", type=int, default=2_000)
    options = parser.parse_args()
    options.gateway = os.path.abspath(options.gateway)
    # Ends as an exception does, so that gateway and sender go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    unshare()
    ip("link", "set", "lo", "up")
    sender, gateway = Sender(), None
    try:
        gateway = Gateway(options.gateway)
        pid, (plain, tls, _, dead) = gateway.process.pid, gateway.ports
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        cost = {}
        for name, port, count, tls_context in (("plain", plain, options.count, None), ("tls", tls, options.tls_count, context)):
            refused(port, 50, request(), tls_context)
            before = cpu_ns(pid)
            refused(port, count, request(), tls_context)
            cost[name] = (cpu_ns(pid) - before) / count
        gateway.admin("POST", "/kernel/block", {"client": FLOOD, "for": "1h"})
        turns, before, ran = 10, cpu_ns(pid), program_ns()
        dropped, closed = [], []
        for _ in range(turns):
            dropped.append(attempts(plain, options.count // turns))
            closed.append(attempts(dead, options.count // turns))
        idle = (cpu_ns(pid) - before) / options.count
        measured = statistics.median(dropped) - statistics.median(closed) + idle
        ran_after = program_ns()
        program = None
        if ran and ran_after and ran_after[1] > ran[1]:
            program = (ran_after[0] - ran[0]) / (ran_after[1] - ran[1])
        drop = max(measured, program or 0, 1)
        syns = bare(options.gateway, sender, options.count * 5)
        of_syns = {f"ratio_{kind}_{name}": round(cost[kind] / max(syns[f"syn_dropped_by_{name}_ns"], 1), 1)
                   for kind in ("plain", "tls") for name in ("listener", "xdp")}
        print(json.dumps({
            "refused_plain_ns": round(cost["plain"]), "refused_tls_ns": round(cost["tls"]),
            "connect_dropped_ns": round(statistics.median(dropped)), "connect_nobody_listens_ns": round(statistics.median(closed)),
            "gateway_meanwhile_ns": round(idle), "program_ns": program and round(program), "drop_ns": round(drop),
            "ratio_plain": round(cost["plain"] / drop, 1), "ratio_tls": round(cost["tls"] / drop, 1),
            "bare": syns | of_syns, "aim_plain": 50, "aim_tls": 500,
        }, indent=2))
    finally:
        if gateway:
            gateway.end()
        sender.end()


if __name__ == "__main__":
    main()
