"""The model as transformers' NanoChatForCausalLM knows it: its configuration, and the names of its weights."""

import torch
from torch import Tensor

import nanochat_kernels as kernels
from nanochat.gpt import GPTConfig
from nanochat.platform.console import say
from nanochat.platform.errors import UserError
from nanochat.platform.shapes import check_shape
from nanochat.tokenizer.bpe import Tokenizer

EPS = torch.finfo(torch.float32).eps  # of every RMSNorm
MOST_EPS = 1e-5  # others are near enough: mean squares of hidden states are about 1
# what the architecture leaves open and a GPT does not
FIXED = {
    "hidden_act": "relu2",
    "final_logit_softcapping": kernels.SOFTCAP,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
SIZES = {
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "max_position_embeddings": int,
    "vocab_size": int,
}


def config_of(config: GPTConfig, tokenizer: Tokenizer) -> dict:
    """The content of config.json."""
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.context_length,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(kernels.ROPE_BASE)},
        **FIXED,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.special("assistant_end"),
        "pad_token_id": tokenizer.special("assistant_end"),
        "dtype": "float32",
    }


def sizes_of(content: dict, path: str) -> GPTConfig:
    """The sizes of the model that a config.json describes. Raises UserError for one that a GPT is not."""
    if content.get("model_type") != "nanochat":
        raise UserError(f"{path} is of the architecture {content.get('model_type')!r}, wanted 'nanochat'")
    content = {"num_key_value_heads": content.get("num_attention_heads")} | content
    if content["num_key_value_heads"] is None:
        content["num_key_value_heads"] = content.get("num_attention_heads")
    check_shape(content, SIZES, path)
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    check_shape(rope, {str: object}, f"{path}['rope_parameters']")
    found = {name: content.get(name, wanted) for name, wanted in FIXED.items()} | {
        "intermediate_size": content["intermediate_size"],
        "head_dim": content.get("head_dim") or content["hidden_size"] // max(1, content["num_attention_heads"]),
        "rope_type": rope.get("rope_type", "default"),
        "rope_theta": rope.get("rope_theta", content.get("rope_theta", kernels.ROPE_BASE)),
    }
    wanted = FIXED | {
        "intermediate_size": 4 * content["hidden_size"],
        "head_dim": content["hidden_size"] // max(1, content["num_attention_heads"]),
        "rope_type": "default",
        "rope_theta": kernels.ROPE_BASE,
    }
    for name, value in wanted.items():
        if found[name] != value:
            raise UserError(
                f"{path} has {name} {found[name]!r}, and a model of nanochat {value!r}; it cannot be imported"
            )
    eps = content.get("rms_norm_eps", 1e-6)
    if not isinstance(eps, int | float) or not 0 <= eps <= MOST_EPS:
        raise UserError(f"{path} has rms_norm_eps {eps!r}, wanted {EPS:.3g}, or at most {MOST_EPS}")
    if abs(eps - EPS) > 1e-12:
        say(f"note {path} has rms_norm_eps {eps}, and here it is {EPS:.3g}: logits differ in their last digits")
    return GPTConfig(
        depth=content["num_hidden_layers"],
        width=content["hidden_size"],
        n_head=content["num_attention_heads"],
        n_kv_head=content["num_key_value_heads"],
        vocab_size=content["vocab_size"],
        context_length=content["max_position_embeddings"],
    )


def names_of(config: GPTConfig) -> dict[str, str]:
    """The names that transformers has for the weights of a GPT."""
    names = {"embedding.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
    parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "project": "o_proj"}
    for block in range(config.depth):
        ours, theirs = f"blocks.{block}", f"model.layers.{block}"
        names |= {f"{ours}.attention.{a}.weight": f"{theirs}.self_attn.{b}.weight" for a, b in parts.items()}
        names |= {
            f"{ours}.mlp.{a}.weight": f"{theirs}.mlp.{b}.weight" for a, b in (("expand", "fc1"), ("project", "fc2"))
        }
    return names


def weights_from(
    tensors: dict[str, Tensor], shapes: dict[str, tuple], config: GPTConfig, path: str
) -> dict[str, Tensor]:
    """The weights of a GPT by our names, in float32, from tensors by the names of transformers.

    shapes: those of the GPT's weights. Raises UserError when a tensor is missing, is not known, has another shape, or is not of
    floating point.
    """
    names = names_of(config)
    for name in sorted({*names.values()} ^ {*tensors}):
        problem = "has no" if name not in tensors else "has the unknown tensor"
        raise UserError(f"{path} {problem} {name}; it is of another model than its config.json says")
    for ours, theirs in names.items():
        tensor = tensors[theirs]
        if tuple(tensor.shape) != shapes[ours] or not tensor.is_floating_point():
            raise UserError(
                f"{path}: {theirs} is {tensor.dtype} of shape {tuple(tensor.shape)}, wanted floating point of shape {shapes[ours]}"
            )
    return {ours: tensors[theirs].float() for ours, theirs in names.items()}
