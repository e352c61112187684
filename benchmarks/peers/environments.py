"""The virtual environments of the peers."""

import subprocess
import venv
from pathlib import Path

ENVIRONMENTS = {  # packages of each virtual environment
    "torch": ("torch==2.13.0", "transformers==5.24.0", "trl==1.16.0", "accelerate==1.15.0", "datasets==5.2.0"),
    "tunix": ("google-tunix==0.1.7", "jax==0.10.2", "flax==0.12.8", "qwix==0.1.8", "transformers==5.12.1"),
    "verl": ("torch==2.13.0", "verl==0.9.1", "transformers==5.10.4"),
}
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"


def make_environment(folder: Path, packages: tuple[str, ...]) -> str:
    """Make a virtual environment with these packages unless the folder holds it already; return its Python."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        # PyTorch is installed separately, because pip would ask its index for all other packages too.
        torch = [name for name in packages if name.startswith("torch==")]
        steps = [["--extra-index-url", CPU_WHEELS, *torch]] * bool(torch) + [list(packages)]
        for step in steps:
            command = [python, "-m", "pip", "install", "-q", *step]
            subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
        (folder / "complete").touch()
    return str(python)


def last_line(error: OSError | subprocess.CalledProcessError) -> str:
    """The last line of the command's stderr, or else of the error's message."""
    return (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
