"""Gradients of a real d4 training run: python -m tests.kernels.gradients writes gradients_d4.safetensors next to this file.

A model of depth 4 (width 256) with a vocabulary of 2,048 trains on the synthetic documents for 40 steps of 2,048 tokens on a CPU,
as in `nanochat train base`. The gradients of three matrices in its second block at the last step are saved in bfloat16.
"""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nanochat.data.pretraining import TokenStream
from nanochat.data.shards import Shards
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.options.data import GenerateOptions
from nanochat.platform.paths import Paths
from nanochat.synthetic.generate import generate
from nanochat.tokenizer.bpe import Tokenizer

STEPS = 40
PATH = Path(__file__).with_name("gradients_d4.safetensors")


def saved() -> dict[str, torch.Tensor]:
    return load_file(PATH)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        paths = Paths(Path(folder))
        generate(GenerateOptions(documents=4000), paths)
        shards = Shards.of(paths, "train")
        tokenizer = Tokenizer.train(shards.documents(), 2048)
        batches = TokenStream(shards, tokenizer, 0, 1, pool).batches(8, 256)
        model = GPT.create(GPTConfig.from_depth(4, 2048, 256))
        optimizer = MuonAdamW(model)
        for _ in range(STEPS):
            batch = next(batches)
            loss = model(batch.inputs, batch.targets)
            loss.backward()
            block = model.blocks[1]
            matrices = {"query": block.attention.query, "expand": block.mlp.expand, "project": block.mlp.project}
            kept = {name: layer.weight.grad.to(torch.bfloat16, copy=True) for name, layer in matrices.items()}
            optimizer.synchronize()
            optimizer.update(1.0, 0.9)
        print(f"loss {loss.item():.2f} after {STEPS} steps")
    save_file(kept, PATH)


if __name__ == "__main__":
    main()
