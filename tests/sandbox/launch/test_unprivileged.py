"""bubblewrap for an ordinary user: nested namespaces instead of user ids."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from retool_jax.sandbox import Limits, SandboxConfig, image, open_sandbox
from retool_jax.sandbox.launch import bubblewrap
from retool_jax.sandbox.launch.runtime import find_runtime
from retool_jax.sandbox.launch.worker import INSIDE, Worker, start

NOBODY = "65534"


@pytest.fixture
def as_nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers of the bubblewrap back-end belong to a user without rights."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user; as another user the rest of the tests show this")
    if shutil.which("setpriv") is None:
        pytest.skip("there is no setpriv, which belongs to util-linux")
    if reason := bubblewrap.missing(SandboxConfig()):
        pytest.skip(f"bubblewrap: {reason}")
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        image.main([f"to={folder / 'image'}", "packages="])
        shutil.copytree(INSIDE, folder / "inside")
        monkeypatch.setattr(bubblewrap, "INSIDE", folder / "inside")
        runtime = find_runtime(str(folder / "image"))

        async def launch(config: SandboxConfig, memory_mb: int) -> Worker:
            command = ["setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--inh-caps=-all"]
            return await start([*command, *bubblewrap.make_command(runtime, False, memory_mb)])

        monkeypatch.setattr(bubblewrap, "launch", launch)
        yield
    finally:
        shutil.rmtree(folder)


def test_programs_of_an_ordinary_user_are_kept_apart_all_the_same(as_nobody):
    programs = {
        "who": "import os\nprint(os.getuid(), os.getpid() == 1)\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('CapEff')])",
        "kill": "import os\nfor victim in (1, -1):\n    try:\n        os.kill(victim, 9)\n"
        "    except ProcessLookupError:\n        print('nobody else')\n"
        "print([p for p in os.listdir('/proc') if p.isdecimal()] == ['1', str(os.getpid())])",
        "leave": "import os\nopen('f', 'w').write('x')\nopen('/dev/shm/f', 'w').write('x')\n"
        "for folder, _, _ in os.walk('/'):\n    try:\n        open(folder + '/left', 'w')\n"
        "    except OSError:\n        pass",
        "find": "import os\nprint(os.listdir('.'), os.listdir('/dev/shm'))\n"
        "print([folder for folder, _, files in os.walk('/') if 'left' in files])",
        "signal": "import os\nprint('a', end='')\nos.abort()",
        "daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\nprint('done')",
        "exit": "import sys\nsys.exit(7)",
        "pool": "import multiprocessing as m\nwith m.Pool(2) as p:\n    print(p.map(abs, [-1, 2]))",
        "new": "def f(x):\n    return -x\n"
        "import multiprocessing as m\nwith m.get_context('forkserver').Pool(1) as p:\n    print(p.map(f, [-1, 2]))",
    }

    async def main():
        async with open_sandbox(SandboxConfig(("bubblewrap",), slots=1, probe_s=0)) as box:
            results = {name: await box.run(code) for name, code in programs.items()}
            odd = "import ctypes\nctypes.CDLL(None).prctl(15, b'\\xff) Z', 0, 0, 0)\nwhile True: pass"
            results["odd name"] = await box.run(odd, limits=Limits(wall_s=0.5))
            bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
            results["bomb"] = await box.run(bomb, limits=Limits(wall_s=0.5))
            async with box.session() as session:
                results["cells"] = [await session.run("x = 1"), await session.run("x + 1")][1]
            return box.description, results

    description, results = asyncio.run(main())
    assert "nested namespaces per program" in description
    assert results["who"].stdout == f"{NOBODY} False\n0000000000000000\n"
    assert results["kill"].stdout == "nobody else\nTrue\n"  # it cannot signal process 1, and there is no other process
    assert results["find"].stdout == "[] []\n[]\n"
    assert (results["signal"].status, results["signal"].signal, results["signal"].stdout) == ("user_error", 6, "a")
    assert results["daemon"].stdout == "done\n" and results["daemon"].wall_s < 5
    assert results["exit"].return_code == 7
    assert results["pool"].stdout == "[1, 2]\n" and results["new"].stdout == "[1, -2]\n"
    assert results["bomb"].status == results["odd name"].status == "timeout"
    assert results["cells"].stdout == "2\n"
    assert all(result.attempts == 1 for result in results.values())
