"""Fork servers: what programs find imported, and what happens when a fork server dies."""

import asyncio
import sys

from retool_jax.sandbox import Limits, SandboxConfig, open_sandbox
from retool_jax.sandbox.launch.procfs import look_at

from ..processes import kill
from ..programs import until

LOADED = "import sys\nprint(*[name for name in ('numpy', 'sympy', 'scipy') if name in sys.modules])"


def test_each_program_is_forked_from_a_process_that_holds_what_it_asks_for(box):
    plain, numpy, sympy, scipy = (
        result.stdout.split()
        for result in (
            *box.run(LOADED),
            *box.run(LOADED + "\nimport numpy"),
            *box.run(LOADED + "\nimport sympy"),
            *box.run(LOADED + "\nimport scipy.optimize"),
        )
    )
    assert plain == []
    assert numpy == ["numpy"]
    assert sympy == ["numpy", "sympy"]
    assert "numpy" in scipy and "scipy" in scipy


SECRETIVE = """import numpy, os
# secret-code
print("secret" + "-output", end="")
os._exit(0)"""
# It does not find itself, and looks at its frames, which are copies of those of the processes that it was forked from.
SEARCH = """import numpy
import re, sys
frame, found = sys._getframe(1), set()
while frame is not None:
    found.update(re.findall("secret-c[o]de", repr(frame.f_locals)))
    frame = frame.f_back
for line in open("/proc/self/maps"):
    start, end = (int(number, 16) for number in line.split()[0].split("-"))
    if line.split()[1].startswith("rw"):
        with open("/proc/self/mem", "rb", 0) as memory:
            memory.seek(start)
            found.update(re.findall(b"secret-(?:c[o]de|out[p]ut)", memory.read(end - start)))
print(found)"""


def test_a_programs_memory_holds_nothing_of_earlier_ones(box):
    for _ in range(2):  # the first starts the fork server, the second does not
        secretive, search = [box.run(code, limits=Limits(wall_s=60))[0] for code in (SECRETIVE, SEARCH)]
        assert (secretive.status, secretive.stdout) == ("success", "secret-output")
        assert (search.stdout, search.stderr) == ("set()\n", "")


def test_random_numbers_differ_from_program_to_program(box):
    for code in (
        "import random\nrandom.random()",
        "import numpy as np\nfloat(np.random.rand())",
        "import numpy as np\nfloat(np.random.default_rng().random())",
        "import sympy\nsympy.core.random.random()",
    ):
        values = [result.stdout for _ in range(3) for result in box.run(code)]
        assert len(set(values)) == 3, code


def test_a_seed_gives_the_same_numbers_every_time(box):
    code = "import random, numpy as np\nrandom.seed(1)\nnp.random.seed(1)\nrandom.random(), float(np.random.rand())"
    assert len({result.stdout for _ in range(3) for result in box.run(code)}) == 1


def test_memory_limit_counts_from_what_the_fork_server_takes(box):
    limits = Limits(memory_mb=128)
    fits, too_much = box.run(
        "import sympy\nlen(bytearray(64 << 20))", "import sympy\nlen(bytearray(160 << 20))", limits=limits
    )
    assert (fits.status, fits.stdout) == ("success", f"{64 << 20}\n")
    assert too_much.status == "oom"


def test_a_fork_server_that_died_is_replaced(worker_pids, descendants):
    def fork_servers(box) -> list[int]:
        return [pid for worker in worker_pids(box) for pid in descendants(worker) if not descendants(pid)]

    async def main():
        async with open_sandbox(SandboxConfig(("process",), slots=1, probe_s=0)) as box:
            first, workers = await box.run("import numpy"), worker_pids(box)
            kill(*(killed := fork_servers(box)))
            await until(lambda: all(seen is None or seen.state == "Z" for seen in map(look_at, killed)))
            again = [await box.run("import numpy\nprint(1)"), await box.run("print(2)")]
            return [first, *again], set(workers) & set(worker_pids(box))

    results, kept = asyncio.run(main())
    assert [(r.status, r.stdout) for r in results] == [("success", ""), ("success", "1\n"), ("success", "2\n")]
    assert kept


def test_programs_see_neither_the_machinery_nor_its_command_line_arguments(box):
    code = (
        "import sys\nprint(sys.argv, [n for n in ('supervisor', 'tiers', 'child', 'wire') if n in sys.modules])\n"
        "print(sorted(k for k in globals() if not k.startswith('__')), sys.path[0] == '', 'inside' in str(sys.path))\n"
        "sys.version.split()[0]"
    )
    (result,) = box.run(code)
    assert result.stdout == f"[''] []\n['sys'] True False\n'{sys.version.split()[0]}'\n"
