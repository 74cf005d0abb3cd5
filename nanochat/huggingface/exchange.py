"""`nanochat export` and `nanochat import`: a model as a directory for transformers, and back.

config.json, generation_config.json       sizes; which tokens end an answer
model.safetensors                         the weights, in float32
tokenizer.json, tokenizer_config.json     the tokenizer
chat_template.jinja                       the chat format
"""

import shutil
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nanochat.checkpoint import CheckpointStore, load_model, save_model, save_tensors
from nanochat.gpt import GPT
from nanochat.huggingface.model import config_of, names_of, sizes_of, weights_from
from nanochat.huggingface.tokenizer import CHAT_TEMPLATE, tokenizer_config, tokenizer_from, tokenizer_json
from nanochat.options.exchange import ExportOptions, ImportOptions
from nanochat.platform.console import say
from nanochat.platform.distributed import start_runtime
from nanochat.platform.errors import UserError
from nanochat.platform.files import foreign_files, fresh_directory, name_some, read_shape, write_json, write_manifest
from nanochat.platform.lock import locked
from nanochat.platform.paths import Paths
from nanochat.tokenizer.bpe import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def export_model(options: ExportOptions, paths: Paths) -> None:
    """Write a checkpoint as a directory for transformers. Raises UserError if it would replace files that nanochat did not write."""
    output = (options.output or paths.run / "export" / options.stage).resolve()
    # before anything is made: a mistyped run leaves none behind
    with start_runtime("cpu") as runtime:
        step = None if options.step < 0 else options.step
        model, tokenizer, meta = load_model(paths, options.stage, runtime, step=step)
    with locked(output.with_name(f"{output.name}.lock"), "export"):
        if output.exists() and (not output.is_dir() or (foreign := foreign_files(output))):
            what = name_some(foreign) if output.is_dir() else output
            raise UserError(
                f"nanochat did not write {what}, and exporting would replace it; move it away or give another --output"
            )
        with fresh_directory(output) as directory:
            write_model(directory, model, tokenizer)
            write_manifest(directory)
    say(
        f"step {meta['step']} of {options.stage} is in {output}; load it with: transformers.AutoModelForCausalLM.from_pretrained"
    )


def write_model(directory: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Write all files of a model to a directory that exists."""
    names, weights = names_of(model.config), dict(model.named_parameters())
    # transformers wants to know what the tensors were made for
    renamed = {theirs: weights[ours].detach().cpu().contiguous() for ours, theirs in names.items()}
    save_tensors(renamed, directory / WEIGHTS, metadata={"format": "pt"})
    end, bos = tokenizer.special("assistant_end"), tokenizer.bos
    write_json(directory / "config.json", config_of(model.config, tokenizer))
    write_json(
        directory / "generation_config.json", {"bos_token_id": bos, "eos_token_id": [end, bos], "pad_token_id": end}
    )
    write_json(directory / "tokenizer.json", tokenizer_json(tokenizer))
    write_json(directory / "tokenizer_config.json", tokenizer_config(tokenizer, model.config.context_length))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")


def import_model(options: ImportOptions, paths: Paths) -> None:
    """Read a directory of transformers into a run, as the checkpoint of a stage. Raises UserError if the run has that stage already,
    or another tokenizer, and for a model that is not one of ours."""
    source = options.source
    if not (source / "config.json").exists():
        raise UserError(f"{source} has no config.json; give the directory of a model that transformers could load")
    config = sizes_of(read_shape(source / "config.json", {str: object}), str(source / "config.json"))
    tokenizer = tokenizer_from(read_shape(source / "tokenizer.json", {str: object}), str(source / "tokenizer.json"))
    if config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{source} has a model of {config.vocab_size} tokens and a tokenizer of {tokenizer.vocab_size}; they do not belong together"
        )
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in GPT(config).named_parameters()}
    weights = weights_from(_tensors(source), shapes, config, str(source))
    with start_runtime("cpu") as runtime:
        store = CheckpointStore(paths.checkpoints(options.stage), runtime)
    with locked(paths.lock("tokenizer"), "import"), locked(paths.lock(options.stage), "import"):
        if store.steps():
            raise UserError(
                f"{store.directory} has checkpoints already; import into a run of its own: --run-name NAME, or move them away"
            )
        is_new = not (paths.tokenizer / "tokenizer.json").exists()
        if not is_new and Tokenizer.load(paths.tokenizer, paths.make_tokenizer).hash != tokenizer.hash:
            raise UserError(
                f"the run {paths.run_name} has another tokenizer in {paths.tokenizer}; import into a run of its own: --run-name NAME"
            )
        try:
            tokenizer.save(paths.tokenizer)
            meta = {"tokenizer": tokenizer.hash, "imported_from": str(source)}
            path = save_model(store, options.step, config, weights, meta)
        except BaseException:  # half a run would be taken for one
            if is_new:
                shutil.rmtree(paths.tokenizer, ignore_errors=True)
            with suppress(OSError):  # there are other stages
                store.directory.rmdir()
                store.directory.parent.rmdir()
            raise
    say(f"imported {source} as {path}; chat with it: nanochat chat --source {options.stage}{paths.as_option}")


def _tensors(source: Path) -> dict[str, torch.Tensor]:
    """The tensors of a directory, which may be spread over several files."""
    names = [WEIGHTS]
    if not (source / WEIGHTS).exists() and (source / INDEX).exists():
        index = read_shape(source / INDEX, {"weight_map": {str: str}})
        names = sorted({*index["weight_map"].values()})
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{source / INDEX} names the file {name!r}, which is not in {source}")
        try:
            tensors |= load_file(source / name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{source / name} cannot be read ({error}); fetch or export the model again") from error
    return tensors
