"""Time of one training step of the shakespeare-cpu preset beside the same model and optimizer in PyTorch, in one process.

    python -m benchmarks.shakespeare tinyshakespeare.txt [--steps 200]

The PyTorch side is the published recipe: a GPT of 4 layers, 4 heads, 128 wide (LayerNorm and linear maps without bias, GELU, learned positions, tied
embeddings), fused attention, AdamW and a clipped gradient norm, context 64, batch 12, its data drawn in the same way. Blocks of steps take turns; the figures are medians of
milliseconds a step. Needs torch, which the project itself does not.
"""

import dataclasses
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.attention import RESULTS, device_name  # noqa: E402
from configs.shakespeare_cpu import get_config  # noqa: E402
from effattn_jax.data import load  # noqa: E402
from effattn_jax.training.setup import prepare  # noqa: E402
from effattn_jax.training.startup import keep_freed_memory  # noqa: E402


def ours(path: str) -> Callable[[int], None]:
    """A function that runs so many steps of the preset."""
    config = get_config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=path))
    setup = prepare(config, load(config.data))
    state = setup.init(np.uint32(0))
    count = 0

    def run(steps: int) -> None:
        nonlocal state, count
        numbers = None
        for _ in range(steps):
            state, numbers = setup.train_step(state, setup.batch(count), np.int32(count))
            count += 1
        jax.block_until_ready(numbers)

    return run


def pytorch(path: str) -> Callable[[int], None]:
    """The same in PyTorch."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    width, heads, layers, context, batch = 128, 4, 4, 64, 12
    text = Path(path).read_text()
    symbols = sorted(set(text))
    number = {c: i for i, c in enumerate(symbols)}
    data = torch.tensor([number[c] for c in text[: len(text) * 9 // 10]])

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
            self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
            self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = (
                y.view(b, t, heads, width // heads).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(width, 2)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, width)
            x = x + self.out(y)
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(len(symbols), width), nn.Embedding(context, width)
            self.blocks = nn.ModuleList(Block() for _ in range(layers))
            self.norm = nn.LayerNorm(width, bias=False)
            for p in self.parameters():
                if p.dim() > 1:
                    nn.init.normal_(p, std=0.02)

        def forward(self, ids):
            x = self.tokens(ids) + self.positions.weight
            for block in self.blocks:
                x = block(x)
            return self.norm(x) @ self.tokens.weight.T

    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)

    def run(steps: int) -> None:
        for _ in range(steps):
            start = torch.randint(len(data) - context, (batch,))
            x, y = (torch.stack([data[i + o : i + o + context] for i in start]) for o in (0, 1))
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return run


def main(path: str, /, steps: int = 200, rounds: int = 7) -> None:
    """Measures both and writes benchmarks/results/shakespeare.json.

    Args:
      path: tinyshakespeare.txt.
      steps: steps of each side a round.
      rounds: rounds; the median counts.
    """
    keep_freed_memory()  # as the trainer does; it must come before the first array
    sides = {"effattn_jax": ours(path), "PyTorch": pytorch(path)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run(20)
    for _ in range(rounds):
        for name, run in sides.items():
            started = time.perf_counter()
            run(steps)
            times[name].append(1e3 * (time.perf_counter() - started) / steps)
    median = {name: statistics.median(values) for name, values in times.items()}
    record = {
        "device": device_name(), "date": datetime.date.today().isoformat(), "jax": jax.__version__,
        "ms_per_step": median, "ratio": median["effattn_jax"] / median["PyTorch"],
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "shakespeare.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
