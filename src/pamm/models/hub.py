"""Saved models on the Hugging Face Hub: which names mean a repository there, and how it is fetched."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pamm.files import cache_folder, first_line, shown
from pamm.models.formats import CONFIG_FILE, WEIGHTS_FILE
from pamm.models.weights import CheckpointError

SCHEME = "hf:"
"""Prefix of a name that can only mean the Hub."""

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""A repository's name: its owner and its own."""


def repository_name(source: str) -> str:
    """The repository that `source`, which is no file or folder, means. Raises CheckpointError where it means none.

    "hf:owner/name" is one; "owner/name" only where no `owner` stands in the working directory, so that a mistyped path of
    a run asks nobody outside.
    """
    name = source.removeprefix(SCHEME)
    if source.startswith(SCHEME):
        if NAME.fullmatch(name):
            return name
        raise CheckpointError(
            f"'{shown(source, 300)}' is no repository of the Hugging Face Hub: expected hf:owner/name"
        )
    tried = f"nothing at {shown(os.path.abspath(os.path.expanduser(source)), 300)}{_near(source)}"
    if not NAME.fullmatch(name):
        raise CheckpointError(
            f"{tried}. Give a run folder, a saved model's folder, or a repository of the Hugging Face Hub as hf:owner/name"
        )
    owner = name.split("/")[0]
    if os.path.lexists(owner):
        raise CheckpointError(
            f"{tried}. The Hugging Face Hub was not asked, since '{owner}' stands here: a repository of this name is hf:{name}"
        )
    return name


def _near(source: str) -> str:
    """A hint at the name in that folder that is most like the one that is absent."""
    folder, name = os.path.split(os.path.expanduser(source).rstrip("/"))
    try:
        near = get_close_matches(name, os.listdir(folder or "."), n=1)
    except (OSError, ValueError):
        near = []
    return f" (did you mean {shown(os.path.join(folder, near[0]), 200)}?)" if near else ""


def download(repository: str, **options: Any) -> Path:
    """The folder that the repository's model was downloaded to, or lies in already. Raises CheckpointError.

    options: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` of huggingface_hub.
    """
    from huggingface_hub import constants, snapshot_download

    options.setdefault("cache_dir", hub_cache())
    options.setdefault("allow_patterns", [CONFIG_FILE, WEIGHTS_FILE])
    try:
        try:
            folder = Path(snapshot_download(repository, **options))
        except PermissionError:  # a cache that may be read only, and does not hold it
            options["cache_dir"] = str(cache_folder("huggingface"))
            folder = Path(snapshot_download(repository, **options))
    except Exception as error:  # huggingface_hub lets those of its HTTP library through
        raise CheckpointError(
            f"'{repository}' is no folder here, and the Hugging Face Hub ({constants.ENDPOINT}) did not give it "
            f"({shown(first_line(error), 300)}). Check the name and the network; a private one needs a token (`hf auth login`)"
        ) from error
    absent = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"the repository '{repository}' of the Hugging Face Hub holds no {' and no '.join(absent)}: it is no model saved by "
            "`save_pretrained` of pamm"
        )
    return folder


def hub_cache() -> str | None:
    """Where downloads are kept: None for huggingface_hub's own place, another where that can be neither read nor written."""
    from huggingface_hub import constants

    own = Path(constants.HF_HUB_CACHE)
    if own.is_absolute():
        with suppress(OSError):
            own.mkdir(parents=True, exist_ok=True)
            if os.access(own, os.R_OK | os.X_OK):
                return None
    return str(cache_folder("huggingface"))
