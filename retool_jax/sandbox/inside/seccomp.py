"""A filter of system calls: it refuses those that attacks on the kernel or on others need and programs do not.

Refused calls fail with EPERM. The filter is a search tree over the numbers of the refused calls, because the kernel
runs it once for each of its system calls whenever a filter is installed.
"""

import ctypes
import errno
import os
import struct

from isolation import LIBC, PR_SET_NO_NEW_PRIVS

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
ALLOW, ERRNO, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, JUMP_EQUAL, JUMP_ABOVE, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF operations
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, little endian

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
NEW_NAMESPACES = 0x7E020000  # every CLONE_NEW* flag that clone() takes
SOCKET_FAMILIES = (1, 2, 10)  # UNIX, INET, INET6; not VSOCK, which reaches the hypervisor, NETLINK or PACKET

# name: (number on x86_64, number on aarch64), -1 where it does not exist
REFUSED = {
    # other processes' memory and descriptors
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    # large parts of the kernel that mathematics does not need
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "vmsplice": (278, 75),
    "memfd_secret": (447, 447),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "personality": (135, 92),
    "modify_ldt": (154, -1),
    "uretprobe": (335, -1),
    "uprobe": (336, -1),
    "lookup_dcookie": (212, 18),
    "nfsservctl": (180, 42),
    "uselib": (134, -1),
    "sysfs": (139, -1),
    "_sysctl": (156, -1),
    # the machine
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "syslog": (103, 116),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, -1),
    "ioperm": (173, -1),
    "vhangup": (153, 58),
    # System V objects and message queues outlive the processes that made them, and nobody would remove them.
    # multiprocessing uses POSIX semaphores and shared memory, which are files that belong to the call.
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "shmdt": (67, 197),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
}
CLONE, CLONE3, SOCKET, SOCKETPAIR = (56, 220), (435, 435), (41, 198), (53, 199)
X32_NUMBERS = 0x40000000  # x86_64 has a second table of calls, which begins here


class Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def build() -> Filter:
    """The filter for this machine. Raises KeyError if its architecture is unknown."""
    architecture, column = ARCHITECTURES[os.uname().machine]
    refuse = [(RETURN, 0, 0, ERRNO | errno.EPERM)]
    allow = [(RETURN, 0, 0, ALLOW)]
    load_argument = (LOAD, 0, 0, FIRST_ARGUMENT)
    family = [
        load_argument,
        *((JUMP_EQUAL, len(SOCKET_FAMILIES) - i, 0, number) for i, number in enumerate(SOCKET_FAMILIES)),
        *refuse,
        *allow,
    ]
    clone = [load_argument, (JUMP_ANY_BIT, 0, 1, NEW_NAMESPACES), *refuse, *allow]
    actions = {numbers[column]: refuse for numbers in REFUSED.values() if numbers[column] >= 0}
    actions |= {SOCKET[column]: family, SOCKETPAIR[column]: family, CLONE[column]: clone}
    actions[CLONE3[column]] = [(RETURN, 0, 0, ERRNO | errno.ENOSYS)]  # its flags lie in memory; libc then uses clone

    def search(numbers: list[int]) -> list[tuple[int, int, int, int]]:
        if len(numbers) == 1:
            return [(JUMP_EQUAL, 1, 0, numbers[0]), *allow, *actions[numbers[0]]]
        middle = len(numbers) // 2
        below, above = search(numbers[:middle]), search(numbers[middle:])
        if len(below) < 256:
            return [(JUMP_ABOVE, len(below), 0, numbers[middle]), *below, *above]
        return [(JUMP_ABOVE, 0, 1, numbers[middle]), (0x05, 0, 0, len(below)), *below, *above]  # 0x05: long jump

    code = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, NUMBER),
        (JUMP_ABOVE, 0, 1, X32_NUMBERS),
        *refuse,
        *search(sorted(actions)),
    ]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in code))
    built = Filter(len(code), ctypes.addressof(packed))
    built.keep = packed  # the structure holds only its address
    return built


def install(filter_: Filter) -> None:
    """Filter this process and all that it forks, permanently. Raises OSError if the kernel refuses."""
    if LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or LIBC.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filter_), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "cannot install the filter of system calls")
