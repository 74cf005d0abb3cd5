"""Bytes per token of the tokenizer on several kinds of text, compared with gpt2 and cl100k_base if their files are there."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import tiktoken

from nanochat.data.shards import Shards
from nanochat.options.tokenizer import TokenizerEvalOptions
from nanochat.platform.console import say
from nanochat.platform.paths import Paths
from nanochat.tokenizer.bpe import Tokenizer, encode_ordinary

TEXTS = {
    "news": (
        "The harbour authority said on Thursday that the new ferry terminal will open three weeks later than planned. "
        "Heavy rain in September had flooded the foundations twice, and 1,200 tonnes of gravel had to be replaced. "
        '"We would rather be late than unsafe," its director told reporters. Ticket prices are to rise by 4.5 percent.'
    ),
    "korean": (
        "오늘 아침 항구에는 안개가 짙게 끼었습니다. 어부들은 배를 띄우지 못하고 찻집에 모여 이야기를 나누었습니다. "
        "점심 무렵 해가 나자 갈매기들이 먼저 날아올랐고, 곧 첫 번째 배가 바다로 나갔습니다."
    ),
    "code": (
        "class Ring:\n    def __init__(self, size: int):\n        self.items = [None] * size\n        self.head = 0\n\n"
        "    def push(self, item):\n        self.items[self.head % len(self.items)] = item\n        self.head += 1\n\n"
        "    def __iter__(self):\n        for i in range(max(0, self.head - len(self.items)), self.head):\n"
        "            yield self.items[i % len(self.items)]\n"
    ),
    "latex": (
        r"\begin{theorem} Let $f\colon [0,1]\to\mathbb{R}$ be continuous and $\varepsilon > 0$. Then there is a polynomial "
        r"$p$ with \[ \sup_{x\in[0,1]} |f(x) - p(x)| < \varepsilon . \] \end{theorem} \begin{proof} Put "
        r"$p_n(x) = \sum_{k=0}^{n} f(k/n) \binom{n}{k} x^k (1-x)^{n-k}$ and bound the variance. \end{proof}"
    ),
    "science": (
        "Mitochondria keep a proton gradient across their inner membrane, about 150 to 180 millivolts, and the enzyme ATP "
        "synthase turns its energy into chemical bonds: roughly three protons pass for every molecule of ATP. When the "
        "membrane leaks, the same gradient only warms the cell, which is how brown fat heats a hibernating animal."
    ),
}
# tiktoken stores each file under the SHA-1 of its address
_ORIGIN = "https://openaipublic.blob.core.windows.net/"
ENCODINGS = {
    "gpt2": ("gpt-2/encodings/main/vocab.bpe", "gpt-2/encodings/main/encoder.json"),
    "cl100k_base": ("encodings/cl100k_base.tiktoken",),
}


def evaluate_tokenizer(options: TokenizerEvalOptions, paths: Paths) -> dict[str, float]:
    """`nanochat tokenizer eval`: print UTF-8 bytes per token for each text and encoding; returns them as "text", "text (gpt2)"."""
    tokenizer = Tokenizer.load(paths.tokenizer, paths.make_tokenizer)
    texts = dict(TEXTS)
    for split in ("train", "val"):
        texts[split] = "\n".join(islice(Shards.of(paths, split).documents(), 200))
    encoders = {"": tokenizer.encode} | {f" ({name})": encode for name, encode in _other_encodings(paths)}
    results = {}
    for kind, text in texts.items():
        size = len(text.encode("utf-8"))
        ratios = {f"{kind}{suffix}": size / len(encode(text)) for suffix, encode in encoders.items()}
        results |= ratios
        say(
            f"{kind:8} {size:7,} bytes | "
            + " | ".join(f"{v:.2f} bytes per token{k[len(kind) :]}" for k, v in ratios.items())
        )
    return results


def _other_encodings(paths: Paths) -> Iterator[tuple[str, Callable[[str], Sequence[int]]]]:
    for name, files in ENCODINGS.items():
        places = {
            _ORIGIN + file: paths.encodings / hashlib.sha1((_ORIGIN + file).encode()).hexdigest() for file in files
        }
        missing = [f"{address} as {path}" for address, path in places.items() if not path.exists()]
        if missing:
            say(f"{name}: left out; to compare with it, store {' and '.join(missing)}")
            continue
        os.environ["TIKTOKEN_CACHE_DIR"] = str(paths.encodings)  # read by tiktoken alone
        yield name, partial(encode_ordinary, tiktoken.get_encoding(name))
