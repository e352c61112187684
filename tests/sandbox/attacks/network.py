"""Attacks over the network, and from it."""

from .case import Case, probe

NETWORK = [
    probe(
        "network",
        "connects to the host's loopback",
        """
import socket
for address in ("127.0.0.1", "localhost", "127.1.2.3", "0.0.0.0", "::1", "::ffff:127.0.0.1", *@ADDRESSES@):
    attempt(address, lambda: socket.create_connection((address, @TCP@), 0.3).recv(100))
""",
        safe=True,
    ),
    probe(
        "network",
        "sends datagrams to the host",
        """
import socket
for address in ("127.0.0.1", *@ADDRESSES@):
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"hello", (address, @UDP@))
    except OSError:
        pass
""",
        safe=True,
    ),
    probe(
        "network",
        "connects to abstract sockets",
        """
import socket
for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
    end = socket.socket(socket.AF_UNIX, kind)
    attempt("abstract", end.connect, "\\0@ABSTRACT@")
for line in open("/proc/net/unix").read().split("\\n")[1:] if os.path.exists("/proc/net/unix") else ():
    if "@" in line.split(" ")[-1]:
        name = line.split(" ")[-1]
        attempt(name, socket.socket(socket.AF_UNIX).connect, "\\0" + name[1:])
""",
        safe=True,
    ),
    probe(
        "network",
        "connects to named sockets",
        """
import socket
for path in ("@UNIX@", "/proc/1/root@UNIX@", "/var/run/docker.sock", "/run/containerd/containerd.sock",
             "/run/dbus/system_bus_socket", "/run/systemd/private", "/run/systemd/notify", "/run/runsc.sock"):
    attempt(path, socket.socket(socket.AF_UNIX).connect, path)
""",
        safe=True,
    ),
    probe(
        "network",
        "asks the cloud and the world",
        """
import socket
for address, port in (("169.254.169.254", 80), ("fd00:ec2::254", 80), ("8.8.8.8", 53), ("1.1.1.1", 443),
                      ("10.0.0.1", 22), ("172.17.0.1", 2375), ("192.168.0.1", 80)):
    attempt(address, lambda: socket.create_connection((address, port), 0.3))
for name in ("example.com", "metadata.google.internal"):
    attempt(name, socket.getaddrinfo, name, 80)
""",
        wall_s=15.0,
    ),
    probe(
        "network",
        "reaches the hypervisor by vsock",
        """
import socket
attempt("open", lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))
for cid in (0, 1, 2, 3):
    def call():
        end = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        end.settimeout(0.3)
        end.connect((cid, 1024))
    attempt(f"connect {cid}", call)
attempt("device", os.open, "/dev/vsock", os.O_RDONLY)
""",
    ),
    probe(
        "network",
        "opens rare socket families",
        """
import socket
for family in (*range(3, 10), *range(11, 16), *range(17, 46)):  # all but UNIX, INET, INET6 and NETLINK
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
        attempt(f"family {family} kind {kind}", lambda: socket.socket(family, kind))
for protocol in (1, 6, 255):
    attempt("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, protocol))
attempt("packet", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
""",
    ),
    probe(
        "network",
        "looks for network devices",
        """
import socket
try:
    names = [name for _, name in socket.if_nameindex()]
except OSError:
    names = []
if set(names) - {"lo"}:
    print("REACHED devices", names)
for path in ("/proc/net/route", "/proc/net/arp", "/proc/net/tcp"):
    rows = open(path).read().splitlines()[1:] if os.path.exists(path) else []
    if any(not row.split()[0].startswith("lo") for row in rows if row.strip()):
        print("REACHED", path, rows[0])
""",
        safe=True,
    ),
    probe(
        "network",
        "talks to the kernel by netlink",
        """
import socket, struct
played = {15} if "@BACKEND@" == "gvisor" else set()  # gVisor's own kernel serves it, like ROUTE
for protocol in {1, 2, 4, 6, 8, 9, 10, 11, 12, 15, 16, 18, 19, 20, 21} - played:
    attempt(f"netlink {protocol}", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol))
def new_device():
    end = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    end.settimeout(1)
    name = b"planted\\0"
    body = struct.pack("<BxHiII", 0, 0, 0, 0, 0) + struct.pack("<HH", 4 + len(name), 3) + name
    end.send(struct.pack("<IHHII", 16 + len(body), 16, 1 | 4 | 0x400, 1, 0) + body)
    code = struct.unpack("<i", end.recv(4096)[16:20])[0]
    if code:
        raise OSError(-code, "refused")
attempt("new device", new_device)
""",
    ),
    probe(
        "network",
        "joins other namespaces",
        """
for pid in (1, os.getppid(), *others()):
    for kind in ("net", "mnt", "pid", "user", "ipc", "uts", "cgroup"):
        def join():
            descriptor = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
            try:
                return syscall(308, descriptor, 0)
            finally:
                os.close(descriptor)
        attempt(f"{pid} {kind}", join)
""",
        wall_s=10.0,
    ),
]


def connects_from_host(host, running) -> str:
    return host.reaches_port_of_program(running)


NETWORK += [
    Case(
        "network",
        "offers a port to the host's network",
        """
import socket
try:
    with socket.create_server(("0.0.0.0", @FREE@)) as server:
        server.settimeout(1.0)
        server.accept()
        print("REACHED from the host")
except OSError:
    pass
""",
        during=connects_from_host,
        safe=True,
    ),
]
