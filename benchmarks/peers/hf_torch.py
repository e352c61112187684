"""Measure transformers' Qwen2 in PyTorch on one thread: `python hf_torch.py WORK`.

`update` is a train step with fused attention (sdpa) and fused AdamW. `generate` samples with transformers' own loop and
its growing cache, `generate_static` with its static one.
"""

import sys

import torch
import transformers
from shape import DRAWN, LENGTH, MODEL, PROMPT, ROWS, report

VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}


def make_model() -> transformers.Qwen2ForCausalLM:
    torch.set_num_threads(1)  # on one core, two threads would spin while they wait for each other
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=MODEL["vocab_size"],
        hidden_size=MODEL["hidden_size"],
        intermediate_size=MODEL["intermediate_size"],
        num_hidden_layers=MODEL["num_layers"],
        num_attention_heads=MODEL["num_heads"],
        num_key_value_heads=MODEL["num_kv_heads"],
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,  # rows do not stop early
        pad_token_id=0,
    )
    return transformers.Qwen2ForCausalLM(config)


def update() -> None:
    model = make_model().train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, MODEL["vocab_size"], (ROWS, LENGTH))

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    report("update", step, **VERSIONS)


def generate(cache: str | None) -> None:
    model = make_model().eval()
    prompts = torch.randint(1, MODEL["vocab_size"], (ROWS, PROMPT))
    how = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=DRAWN,
        cache_implementation=cache,
        disable_compile=True,
        pad_token_id=0,
    )

    def step() -> None:
        with torch.no_grad():
            drawn = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=how)
        assert drawn.shape == (ROWS, PROMPT + DRAWN)

    report("generate", step, **VERSIONS)


if __name__ == "__main__":
    {"update": update, "generate": lambda: generate(None), "generate_static": lambda: generate("static")}[sys.argv[1]]()
