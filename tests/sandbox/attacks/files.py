"""Attacks on the file system."""

from .case import probe

FILES = [
    probe(
        "files",
        "reads the canary",
        """
for path in ("@CANARY@", "/proc/self/root@CANARY@", "/proc/1/root@CANARY@", f"/proc/{os.getppid()}/root@CANARY@",
             "../" * 40 + "@CANARY@", "//@CANARY@", "/host@CANARY@", "/oldroot@CANARY@", "/old_root@CANARY@"):
    attempt(path, read, path)
    attempt("stat " + path, os.stat, path)
""",
        safe=True,
    ),
    probe(
        "files",
        "changes the canary",
        """
attempt("write", write, "@CANARY@")
for call in (os.unlink, os.stat, os.listdir, lambda path: os.truncate(path, 0), lambda path: os.chmod(path, 0o777),
             lambda path: os.rename(path, path + "2"), lambda path: os.utime(path), lambda path: os.chown(path, 1, 1)):
    attempt("change", call, "@CANARY@")
attempt("beside", write, "@FOLDER@/planted")
""",
    ),
    probe(
        "files",
        "reads the canary through links",
        """
os.symlink("@CANARY@", "soft")
attempt("soft link", read, "soft")
attempt("hard link", os.link, "@CANARY@", "hard")
os.symlink("/proc/1/root", "root")
attempt("root link", read, "root@CANARY@")
attempt("linkat through proc", lambda: os.link("/proc/self/fd/0", "fd", follow_symlinks=True))
""",
        safe=True,
    ),
    probe(
        "files",
        "reads through other processes",
        """
for pid in others():
    for part in ("root", "cwd"):
        for path in ("@CANARY@", "/etc/shadow", "/@CANARY@"):
            attempt(f"{pid} {part}", read, f"/proc/{pid}/{part}{path}")
    attempt(f"{pid} exe", write, f"/proc/{pid}/exe")
""",
    ),
    probe(
        "files",
        "looks for the host's folders",
        """
seen = 0
for top in ("/", "/home", "/root", "/srv", "/mnt", "/media", "/opt", "/run", "/var", "/tmp", "/work", "/etc"):
    for folder, folders, names in os.walk(top):
        if folder.count("/") > 4 or folder.startswith(("/proc", "/sys", "/usr", "/lib")):
            folders.clear()
        seen += len(names)
        for name in names:
            if name == "@CANARY_NAME@" or name in ("docker.sock", "id_rsa", "authorized_keys", ".bash_history"):
                print("REACHED", folder, name)
        if seen > 20000:
            folders.clear()
""",
        safe=True,
        wall_s=15.0,
    ),
    probe(
        "files",
        "reads the machine's secrets",
        """
for path in ("/etc/shadow", "/etc/gshadow", "/etc/sudoers", "/root/.ssh/id_rsa", "/etc/ssh/sshd_config",
             "/var/run/secrets/kubernetes.io/serviceaccount/token", "/etc/machine-id", "/var/log/dpkg.log",
             "/proc/kcore", "/proc/kmsg", "/dev/kmsg", "/dev/mem", "/var/lib/dpkg/status", "/boot/grub/grub.cfg"):
    attempt(path, read, path, 100)
""",
    ),
    probe(
        "files",
        "writes outside its working directory",
        """
allowed = [os.path.realpath(p) for p in (os.getcwd(), "/tmp", "/var/tmp", "/dev/shm", os.environ["HOME"])]
for top in ["/", *(f"/{name}" for name in os.listdir("/"))]:
    for folder, folders, _ in os.walk(top):
        folders[:] = [] if folder.count("/") > 3 or folder.startswith(("/proc", "/sys")) else folders[:40]
        if any(os.path.realpath(folder).startswith(path) for path in allowed):
            folders.clear()
            continue
        attempt(folder, write, f"{folder}/planted")
        attempt("folder in " + folder, os.mkdir, f"{folder}/planted-folder")
""",
        wall_s=15.0,
    ),
    probe(
        "files",
        "writes into the interpreter's folders",
        """
import json, site, sysconfig
import numpy
for path in (json.__file__, numpy.__file__, os.__file__, sys.executable, "/usr/bin/env", "/etc/ld.so.preload",
             sysconfig.get_path("purelib") + "/sitecustomize.py", sysconfig.get_path("stdlib") + "/usercustomize.py"):
    attempt(path, lambda: open(path, "ab").close())
    attempt("chmod " + path, os.chmod, path, 0o777)
    attempt("unlink " + path, os.unlink, path)
""",
    ),
    probe(
        "files",
        "opens devices",
        """
import stat
harmless = {"fuse", "tun"} if "@BACKEND@" == "gvisor" else set()  # its own kernel's, useless without rights
harmless |= {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "stdin", "stdout", "stderr"}
for folder, _, names in os.walk("/dev"):
    for name in names:
        path = f"{folder}/{name}"
        mode = os.lstat(path).st_mode
        if name not in harmless and (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)):
            attempt(path, os.open, path, os.O_RDONLY | os.O_NONBLOCK)
for name, kind, major, minor in (("disk", stat.S_IFBLK, 254, 0), ("memory", stat.S_IFCHR, 1, 1)):
    attempt("mknod " + name, lambda: (os.mknod(name, 0o666 | kind, os.makedev(major, minor)), read(name, 1)))
""",
    ),
    probe(
        "files",
        "mounts",
        """
os.mkdir("m")
for source, kind, flags in ((b"none", b"tmpfs", 0), (b"proc", b"proc", 0),
                            (b"/", b"none", 4096 | 16384),
                            (b"sysfs", b"sysfs", 0), (b"none", b"none", 32 | 4096),
                            (b"cgroup", b"cgroup2", 0), (b"none", b"mqueue", 0)):
    attempt(f"mount {kind}", syscall, 165, source, b"m", kind, flags, None)
attempt("remount /", syscall, 165, b"none", b"/", b"none", 32 | 4096, None)
attempt("umount /proc", syscall, 166, b"/proc", 2)
attempt("umount cwd", syscall, 166, os.getcwd().encode(), 2)
attempt("open_tree", syscall, 428, -100, b"/", 1)
attempt("move_mount", syscall, 429, -100, b"/proc", -100, b"m", 0)
attempt("fsopen", syscall, 430, b"tmpfs", 0)
attempt("mount_setattr", syscall, 442, -100, b"/", 0, None, 0)
attempt("pivot_root", syscall, 155, b".", b"m")
""",
    ),
    probe(
        "files",
        "leaves through chroot",
        """
os.mkdir("jail")
outside = os.open("/", os.O_RDONLY)
for path in ("/proc/1/root", f"/proc/{os.getppid()}/root", "jail"):
    attempt("chroot " + path, os.chroot, path)
os.fchdir(outside)
for _ in range(100):
    os.chdir("..")
attempt("chroot .", os.chroot, ".")
attempt("canary", read, "@CANARY@")
""",
    ),
    probe(
        "files",
        "opens by handle",
        """
import struct
handle = ctypes.create_string_buffer(struct.pack("<Ii", 8, 1) + struct.pack("<II", 2, 0) + bytes(120))
for descriptor in (0, 1, 2, os.open(".", os.O_RDONLY), os.open("/", os.O_RDONLY), os.open("/usr", os.O_RDONLY)):
    attempt("open_by_handle_at", syscall, 304, descriptor, handle, os.O_RDONLY)
""",
    ),
    probe(
        "files",
        "gains rights from set-user-id programs",
        """
import subprocess
before = os.getuid(), os.geteuid()
for folder in ("/bin", "/usr/bin", "/sbin", "/usr/sbin", "/usr/lib/openssh", "/usr/libexec"):
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        path = f"{folder}/{name}"
        if os.path.exists(path) and os.stat(path).st_mode & 0o6000 and not os.path.islink(path):
            done = subprocess.run([path, "--help"], capture_output=True, stdin=subprocess.DEVNULL, timeout=5)
for call in (os.setuid, os.setgid, lambda _: os.setresuid(0, 0, 0), lambda _: os.setgroups([0])):
    attempt("become root", call, 0)
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
for name in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
    if int(status.get(name, "0"), 16):
        print("REACHED", name, status[name])
if 0 in (os.getuid(), os.geteuid(), os.getgid(), os.getegid()):
    print("REACHED uid 0")
write("own", b"#!/bin/sh")
os.chmod("own", 0o6755)
""",
    ),
    probe(
        "files",
        "touches the kernel's switches",
        """
for path, data in (("/proc/sysrq-trigger", b"h"), ("/proc/sys/kernel/core_pattern", b"core"),
                   ("/proc/sys/vm/drop_caches", b"0"),
                   ("/proc/sys/kernel/hostname", b"taken"), ("/proc/sys/kernel/modprobe", b"/tmp/x"),
                   ("/sys/kernel/uevent_helper", b"/tmp/x"), ("/proc/1/oom_score_adj", b"-1000"),
                   ("/sys/power/state", b"none"),
                   ("/proc/sys/kernel/panic", b"0")):
    attempt(path, write, path, data)
for top in ("/sys/fs/cgroup", "/sys/kernel/debug", "/sys/kernel/security", "/sys/fs/bpf", "/sys/kernel/tracing"):
    for folder, folders, names in os.walk(top):
        folders[:] = folders[:10]
        for name in names[:20]:
            attempt(f"{folder}/{name}", lambda: os.close(os.open(f"{folder}/{name}", os.O_WRONLY)))
        attempt("group in " + folder, os.mkdir, folder + "/planted")
""",
    ),
    probe(
        "files",
        "finds descriptors of the host",
        """
import stat
for name in os.listdir("/proc/self/fd"):
    try:
        link, mode = os.readlink(f"/proc/self/fd/{name}"), os.fstat(int(name)).st_mode
    except OSError:
        continue  # the one that lists the folder
    if stat.S_ISSOCK(mode) and name == "3":
        continue  # on which the program reports its own beginning and end
    if stat.S_ISDIR(mode) and not link.startswith("/proc/") or stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        print("REACHED", name, link)
    if stat.S_ISREG(mode) and not link.startswith(("/memfd:", "memfd:", "/dev/null")):
        print("REACHED", name, link)
""",
        safe=True,
    ),
    probe(
        "files",
        "reads the host's shared memory",
        """
for name in os.listdir("/dev/shm"):
    attempt(name, read, f"/dev/shm/{name}")
attempt("the one by name", read, "/dev/shm/@SHM_NAME@")
segment = attempt("shmget", syscall, 29, @SHM_KEY@, 0, 0)
""",
        safe=True,
    ),
]
