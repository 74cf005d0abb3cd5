"""The tokenizer as the tokenizers library stores it, and the chat format as a template."""

from nanochat.platform.errors import UserError
from nanochat.platform.shapes import check_shape
from nanochat.tokenizer.bpe import SPECIALS, Tokenizer

TOKENIZER = {
    "added_tokens": [{"id": int, "content": str}],
    "pre_tokenizer": {str: object},
    "model": {"type": str, "vocab": {str: int}, "merges": [object]},
}

# A system message joins the first user message, as in nanochat/tokenizer/chat_format.py. Content is text, or a list of parts; those of
# user and system are text, as clients of OpenAI's API write it.
CHAT_TEMPLATE = """\
{%- set frames = {
    'text': ('', ''),
    'python': ('<|python_start|>', '<|python_end|>'),
    'python_output': ('<|output_start|>', '<|output_end|>'),
} -%}
{%- macro render(message) -%}
    {%- set content = message['content'] -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is undefined or content is mapping or content is not iterable -%}
        {{- raise_exception('content must be text or a list of parts, in a message of ' ~ message['role']) -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part is not mapping or part['text'] is not string or part['type'] not in
                (frames if message['role'] == 'assistant' else ['text']) -%}
                {{- raise_exception('unknown part of a message of ' ~ message['role'] ~ ': ' ~ part) -}}
            {%- endif -%}
            {{- frames[part['type']][0] ~ part['text'] ~ frames[part['type']][1] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if not messages -%}
    {{- raise_exception('there must be one message or more') -}}
{%- endif -%}
{%- set system = messages[0]['role'] == 'system' -%}
{%- if system and (messages | length < 2 or messages[1]['role'] != 'user') -%}
    {{- raise_exception('a system message must be followed by a user message') -}}
{%- endif -%}
{{- '<|bos|>' -}}
{%- for message in (messages[1:] if system else messages) -%}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('user and assistant must take turns, got ' ~ message['role']) -}}
    {%- endif -%}
    {{- '<|' ~ message['role'] ~ '_start|>' -}}
    {%- if system and loop.first -%}{{- render(messages[0]) ~ '\\n\\n' -}}{%- endif -%}
    {{- render(message) ~ '<|' ~ message['role'] ~ '_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
"""


def byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte: itself if it is one, else one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """The content of tokenizer.json. Encoding with special tokens puts bos first."""
    characters = byte_characters()
    bos, bos_id = tokenizer.specials[tokenizer.bos - len(tokenizer.ranks)], tokenizer.bos
    ids = {token: rank for rank, token in enumerate(tokenizer.ranks)}

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    # tiktoken joins any two neighbours whose bytes together are a token, so that each split into two tokens is a merge
    merges = [
        [written(token[:cut]), written(token[cut:])]
        for token in tokenizer.ranks
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    sequences = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            for id, name in enumerate(tokenizer.specials, len(tokenizer.ranks))
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, sequences[0]],
            "pair": [first, *sequences],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {written(token): rank for token, rank in ids.items()},
            "merges": merges,
        },
    }  # fmt: skip


def tokenizer_config(tokenizer: Tokenizer, context_length: int) -> dict:
    """The content of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "pad_token": "<|assistant_end|>",
        "additional_special_tokens": [
            name for name in tokenizer.specials if name not in ("<|bos|>", "<|assistant_end|>")
        ],
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }


def tokenizer_from(content: dict, path: str) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes.

    Raises UserError for one that is not ours: byte-level BPE whose ids are the order of merges, followed by the nine special tokens.
    """
    check_shape(content, TOKENIZER, path)
    vocab, added = content["model"]["vocab"], {token["content"]: token["id"] for token in content["added_tokens"]}
    ordinary = {token: id for token, id in vocab.items() if token not in added}
    bytes_of = {character: byte for byte, character in enumerate(byte_characters())}
    ordered = sorted(ordinary, key=ordinary.get)
    splits = [
        part
        for part in content["pre_tokenizer"].get("pretokenizers", [])
        if isinstance(part, dict) and part.get("type") == "Split"
    ]
    pattern = splits[0].get("pattern", {}).get("Regex") if splits else None
    problem = None
    if content["model"]["type"] != "BPE" or not isinstance(pattern, str):
        problem = (
            f"is {content['model']['type']} with the pattern {pattern!r}, wanted BPE with a pattern that splits text"
        )
    elif unknown := next((token for token in ordered if not {*token} <= bytes_of.keys()), None):
        problem = f"has the token {unknown!r}, which is not written in bytes"
    elif [ordinary[token] for token in ordered] != [*range(len(ordered))]:
        problem = "has ids with gaps"
    elif missing := {*bytes_of} - {*ordered}:
        problem = f"lacks {len(missing)} of the 256 bytes"
    elif [name for name, _ in sorted(added.items(), key=lambda item: item[1])] != [*SPECIALS]:
        problem = f"has the special tokens {', '.join(added) or 'none'}, wanted {', '.join(SPECIALS)} in this order"
    elif [*sorted(added.values())] != [*range(len(ordered), len(ordered) + len(SPECIALS))]:
        problem = "has special tokens whose ids are not the last ones"
    elif not _in_order(content["model"]["merges"], ordinary):
        problem = "has merges in another order than their tokens"
    if problem:
        raise UserError(f"{path} {problem}; only a tokenizer such as `nanochat export` writes can be imported")
    return Tokenizer([bytes(bytes_of[character] for character in token) for token in ordered], pattern)


def _in_order(merges: list, vocab: dict[str, int]) -> bool:
    """Whether each merge makes a token, and no later one a token with a smaller id: then ids say all that merges do."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    ids = [vocab.get("".join(map(str, pair)), -1) if isinstance(pair, list) else -1 for pair in pairs]
    return -1 not in ids and ids == sorted(ids)
