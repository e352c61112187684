"""A train step of transformers' Qwen2 in PyTorch, with its fused attention (sdpa) and fused AdamW, on one thread."""

import torch
import transformers
from shape import LENGTH, MODEL, ROWS, report


def main() -> None:
    torch.set_num_threads(1)  # two spin against each other on one core
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
        use_cache=False,
    )
    model = transformers.Qwen2ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, MODEL["vocab_size"], (ROWS, LENGTH))

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    report(step, torch=torch.__version__, transformers=transformers.__version__)


if __name__ == "__main__":
    main()
