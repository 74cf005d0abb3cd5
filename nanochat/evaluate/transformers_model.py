"""A causal language model of the transformers library, with what CORE needs of a model and of its tokenizer."""

import hashlib
import os
from pathlib import Path

from huggingface_hub.utils import logging
from safetensors import SafetensorError
from torch import Tensor

from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError


class TransformersModel:
    """Gives logits as GPT does. `hidden` has the logits of all positions already, because models differ in what they do with them."""

    def __init__(self, model, runtime: Runtime):
        self.model, self.device = model, runtime.device
        sizes = (getattr(model.config, name, None) for name in ("max_position_embeddings", "n_positions"))
        self.positions = next((size for size in sizes if size), 2048)

    def hidden(self, tokens: Tensor) -> Tensor:
        """The logits (B, T, V) for tokens (B, T), whose padding is on the right."""
        return self.model(tokens, use_cache=False).logits

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.float()


class TransformersTokenizer:
    """Encodes text without special tokens; bos: the token that begins a text, or else the one that ends it."""

    def __init__(self, tokenizer, name: str):
        self.tokenizer = tokenizer
        first = (token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None)
        self.bos = next(first, None)
        if self.bos is None:
            raise UserError(f"the tokenizer of {name} has neither a token that begins a text nor one that ends it")
        if not self.encode("text"):
            raise UserError(
                f"the tokenizer of {name} turns a text into no tokens; its files are missing or damaged, get them again"
            )

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def load_transformers(name: str, runtime: Runtime) -> tuple[TransformersModel, TransformersTokenizer]:
    """Load a model from a directory, or by its name on the Hugging Face hub from the cache or the internet.

    Only weights in safetensors are read, and no code that comes with a model runs. Raises UserError when transformers is not
    installed, when it cannot load the model, and when weights or the tokenizer are missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"--hf-path needs the package transformers ({error}); install it with: pip install transformers"
        ) from error
    logging.set_verbosity_error()  # of each attempt to reach the hub; what came of it is said below
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name,
            trust_remote_code=False,
            dtype=runtime.compute_dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        where = (
            "the directory has no such model"
            if Path(name).is_dir()
            else "no such directory, and not on the hub or no internet"
        )
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--hf-path {name}: transformers cannot load it ({where}: {reason})") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"--hf-path {name} lacks {len(missing)} of the model's weights, such as {missing[0]}; get the whole model again"
        )
    return TransformersModel(model.to(runtime.device).eval(), runtime), TransformersTokenizer(tokenizer, name)


def slug(name: str) -> str:
    """The name of a model as a part of the name of a file. Directories with the same last names differ by a hash of the whole path."""
    path = Path(name)
    parts = ["".join(c if c.isalnum() or c in "._-" else "-" for c in part) for part in path.parts[-2:] if part != "/"]
    if path.is_dir():
        parts.append(hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8])
    return "--".join(parts)  # which no name on the hub has
