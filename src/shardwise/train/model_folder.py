"""What a transformers folder has besides weights: config, generation config, tokenizer. Written when a run begins, so
that its checkpoints can become such folders (`export`).

Knows transformers' files; refuses to know weights and layouts.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from shardwise.errors import CheckpointError
from shardwise.tasks.tokenizer import END_OF_TEXT, TOKENIZER_FILE
from shardwise.train.conversions import is_transformers

__all__ = ["copy_folder", "empty_model_of", "write_model", "write_tokenizer"]

_CONFIG = "config.json"
_TOKENIZER_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)


def write_model(folder: Path, model: nn.Module) -> None:
    """The config of a transformers model, and how it generates; nothing for a model of somebody's own."""
    if not is_transformers(model):
        return
    folder.mkdir(parents=True, exist_ok=True)
    described: Any = model
    config = copy.deepcopy(described.config)
    config.architectures = [type(model).__name__]
    config.dtype = next(model.parameters()).dtype
    if getattr(config, "use_cache", None) is False:
        config.use_cache = True  # it is off while a model is trained
    config.to_json_file(folder / _CONFIG, use_diff=True)
    if described.can_generate() and described.generation_config is not None:
        described.generation_config.save_pretrained(folder)


def write_tokenizer(folder: Path, source: Path, *, trained_here: bool) -> None:
    """The tokenizer in `source`, a tokenizer.json or a folder; one that was trained here becomes transformers'."""
    folder.mkdir(parents=True, exist_ok=True)
    if not trained_here:
        files = [source] if source.is_file() else [source / name for name in _TOKENIZER_FILES]
        for file in files:
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        return
    import transformers

    file = source if source.is_file() else source / TOKENIZER_FILE
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(file), bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )
    tokenizer.save_pretrained(folder)
    _set_ends(folder, tokenizer.eos_token_id)


def empty_model_of(folder: Path) -> nn.Module | None:
    """The transformers model whose config is in the folder, without values; None where there is none."""
    if not (folder / _CONFIG).is_file():
        return None
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or [""])[0]
    family = getattr(transformers, name, None)
    if family is None:
        raise CheckpointError(
            f"{folder / _CONFIG} names the class of a model that transformers {transformers.__version__} has, but "
            f"says {name!r}; export with the version that trained it"
        )
    with torch.device("meta"):
        model: nn.Module = family._from_config(config)
    return model


def copy_folder(described: Path, folder: Path, *, dtype: str) -> tuple[Path, ...]:
    """Everything but weights, for weights of a dtype; returns the files."""
    written: list[Path] = []
    for file in sorted(described.iterdir()):
        if file.name == _CONFIG:
            config = json.loads(file.read_text(encoding="utf-8"))
            text = json.dumps(config | {"dtype": dtype}, indent=2, sort_keys=True) + "\n"
            (folder / file.name).write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(file, folder / file.name)
        written.append(folder / file.name)
    return tuple(written)


def _set_ends(folder: Path, end: int) -> None:
    """Texts begin and end with the token that training put between documents."""
    for name in (_CONFIG, "generation_config.json"):
        path = folder / name
        if path.is_file():
            values = json.loads(path.read_text(encoding="utf-8")) | {"bos_token_id": end, "eos_token_id": end}
            path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
