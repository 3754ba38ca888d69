"""Makes a model directory in Qwen3's shape with random weights, to measure speed without a real model.

    python benchmarks/make_model.py outputs/model_4b --size 4b

The model uses the tokens of the tiny policy's tokenizer; the other ids of its vocabulary are padding. Tokens
that stand for whole lines of a prompt are left out, so that prompts are about as long as a real model's.

The model never ends a reply: every request gets exactly its maximum number of tokens, without a parameter
such as ignore_eos. Hidden channel 0 carries a constant of the input token, as no layer writes to it. The tied
output weights of ids that must not be sampled (end of turn, tags, padding) have a large negative value in
this channel. So the logits of these ids are hundreds below the others, whose distribution hardly changes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

TINY = Path(__file__).resolve().parent.parent / "gymexp" / "assets" / "tiny"
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 512,
        "vocab_size": 4096,
    },
    # Qwen3-0.6B's, with 22 layers in place of 28.
    "0.5b": {
        "hidden_size": 1024,
        "num_hidden_layers": 22,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151_936,
    },
    # Qwen2.5-1.5B's.
    "1.5b": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "intermediate_size": 8960,
        "vocab_size": 151_936,
    },
    # Qwen3-4B's.
    "4b": {
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9728,
        "vocab_size": 151_936,
    },
}
MAX_LENGTH = 40_960
STD = 0.02
# Channel 0: the value of a token that may be sampled, the value of one that must not be, and the weight of
# the last norm. The norm divides the channel by the hidden state's size (between 0.3 and 10); its weight
# makes the channel large again.
MAY, MUST_NOT, LAST_NORM = 0.01, -600.0, 20.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--short-prompts", action="store_true", help="keep the tokens that stand for whole lines"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    num = make(args.directory, args.size, args.dtype, args.short_prompts, args.seed)
    print(f"{args.directory}: {num / 1e9:.3f}B parameters in {time.monotonic() - began:.1f} s")


def make(
    directory: Path, size: str, dtype: str = "bfloat16", short_prompts: bool = False, seed: int = 0
) -> int:
    """Writes the model directory; returns the number of parameters."""
    from safetensors.torch import save_file

    tensors = make_tensors(directory, size, dtype, short_prompts, seed)
    on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
    save_file(on_cpu, directory / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def make_tensors(
    directory: Path,
    size: str,
    dtype: str = "bfloat16",
    short_prompts: bool = False,
    seed: int = 0,
    device: Any = None,
) -> dict[str, Any]:
    """Writes the model directory without its weights, and returns the weights.

    They are on `device`; by default on the first GPU, or on the CPU without GPUs.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(directory, short_prompts)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = Qwen3Config(
        **SIZES[size],
        max_position_embeddings=MAX_LENGTH,
        max_window_layers=SIZES[size]["num_hidden_layers"],
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        architectures=["Qwen3ForCausalLM"],
        dtype=dtype,
    )
    config.save_pretrained(directory)
    generation = {"do_sample": True, "temperature": 1.0, "eos_token_id": [end], "pad_token_id": pad}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Qwen3ForCausalLM(config).named_parameters()}
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(seed)
    allowed = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder))
    assert tokenizer.encode("assistant\n", add_special_tokens=False)[-1] in allowed, "a prompt's last token"
    tensors = {}
    for name, shape in shapes.items():  # the output head is tied to the embedding and not listed
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        fill(name, tensor, config.num_hidden_layers, allowed, generator)
        tensors[name] = tensor
    return tensors


def fill(name: str, tensor: Any, num_layers: int, allowed: list[int], generator: Any) -> None:
    """Fills a weight in place with random numbers, and channel 0 as the module describes.

    Matrices that write to the residual stream are scaled down with depth, as in GPT-2.
    """
    if name.endswith("norm.weight"):
        tensor.fill_(1.0)
        if name == "model.norm.weight":
            tensor[0] = LAST_NORM
        return
    writes = name.endswith(("o_proj.weight", "down_proj.weight"))
    tensor.normal_(0.0, STD / (2 * num_layers) ** 0.5 if writes else STD, generator=generator)
    if writes:
        tensor[0] = 0.0
    if name == "model.embed_tokens.weight":
        tensor[:, 0] = MUST_NOT
        tensor[allowed, 0] = MAY


def write_tokenizer(directory: Path, short_prompts: bool) -> Any:
    from transformers import AutoTokenizer

    shutil.copy(TINY / "chat_template.jinja", directory)
    core = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    if not short_prompts:
        vocab = core["model"]["vocab"]
        core["added_tokens"] = [token for token in core["added_tokens"] if token["content"] in vocab]
    (directory / "tokenizer.json").write_text(json.dumps(core, ensure_ascii=False), encoding="utf-8")
    config = json.loads((TINY / "tokenizer_config.json").read_text()) | {"model_max_length": MAX_LENGTH}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return AutoTokenizer.from_pretrained(directory)


if __name__ == "__main__":
    main()
