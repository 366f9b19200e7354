"""The uploads of 2023, loaded by the line on their own card: `pipeline(..., model="AI-ModelScope/dolly-v2-12b", ...)`.

Their configuration.json demands that Python files of the repository are imported (`allow_remote`) or that packages it
names are installed (`plugins`). ModelScope refuses that without `trust_remote_code=True`, before it calls any plugin.
The hook in this file gives ModelScope the configuration.json of this package in place of such a repository's, if the
repository's own config.json and tokenizer are those of a dolly-v2. This can only take trust away: no code of the
repository is imported, not even with `trust_remote_code=True`, and every other model is handled as without the hook.

`modelscope_dolly` calls `install` when ModelScope has imported one of the modules in HOOKS.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from modelscope_dolly.errors import DollyError

log = logging.getLogger("modelscope.dolly")

#: "0" in this environment variable leaves these uploads to ModelScope.
SWITCH = "DOLLY_LEGACY_UPLOADS"
#: ModelScope's default, in `pipeline` as in `Model.from_pretrained`.
_REVISION = "master"
_CONFIGURATION = "configuration.json"
#: With config.json, what decides whether a repository holds a dolly-v2.
_TOKENIZER_FILES = ("tokenizer.json", "special_tokens_map.json", "tokenizer_config.json")


def install(module: ModuleType) -> None:
    """Put the hook into one of ModelScope's modules; where its inner names differ, log one line and change nothing."""
    if not HOOKS[module.__name__](module):
        log.warning(
            "%s of modelscope %s is not built as this package knows it: a dolly-v2 upload that demands code of its own "
            "loads with modelscope_dolly.dolly_pipeline() only",
            module.__name__, getattr(sys.modules.get("modelscope"), "__version__", "of unknown version"),
        )  # fmt: skip


def _hook_builder(builder: ModuleType) -> bool:
    """For `pipeline`, which looks up both functions by name at each call; False if it does not."""
    read_config, prepare = (getattr(builder, name, None) for name in ("read_config", "normalize_model_input"))
    looked_up = getattr(getattr(getattr(builder, "pipeline", None), "__code__", None), "co_names", ())
    if not (
        {"read_config", "normalize_model_input"} <= set(looked_up)
        and _takes(read_config, "model_id_or_path", "revision")
        and _takes(prepare, "model", "model_revision")
    ):
        return False
    recognised: set[tuple[str, str | None]] = set()

    @functools.wraps(read_config)
    def read_harmless_config(model_id_or_path: str, revision: str | None = _REVISION, **options: Any) -> Any:
        configuration = read_config(model_id_or_path, revision, **options)
        if not (_is_on() and _is_legacy_dolly(configuration, model_id_or_path, revision)):
            recognised.discard((model_id_or_path, revision))
            return configuration
        recognised.add((model_id_or_path, revision))
        return read_config(_our_configuration())

    @functools.wraps(prepare)
    def download_without_code(model: Any, model_revision: str | None, **options: Any) -> Any:
        if isinstance(model, str) and (model, model_revision) in recognised:
            model = _download(model, model_revision, options)
        return prepare(model, model_revision, **options)

    builder.read_config, builder.normalize_model_input = read_harmless_config, download_without_code
    return True


def _hook_base_model(base_model: ModuleType) -> bool:
    """For `Model.from_pretrained`, which reads the configuration in a way of its own; False if it is another."""
    model_class, config_class = (getattr(base_model, name, None) for name in ("Model", "Config"))
    load = getattr(getattr(model_class, "from_pretrained", None), "__func__", None)
    if not (_takes(load, "cls", "model_name_or_path", "revision", "cfg_dict") and hasattr(config_class, "from_file")):
        return False

    @functools.wraps(load)
    def load_without_code(
        cls: type, model_name_or_path: str, revision: str | None = _REVISION, cfg_dict: Any = None, *rest, **options
    ) -> Any:
        model, name = model_name_or_path, str(model_name_or_path)
        if cfg_dict is None and _is_on() and _is_legacy_dolly(_read_configuration(name, revision), name, revision):
            model, cfg_dict = _download(name, revision, options), config_class.from_file(_our_configuration())
        return load(cls, model, revision, cfg_dict, *rest, **options)

    model_class.from_pretrained = classmethod(load_without_code)
    return True


#: ModelScope's modules that the hook changes -> what changes them, and returns False if it cannot.
HOOKS = {"modelscope.pipelines.builder": _hook_builder, "modelscope.models.base.base_model": _hook_base_model}


def _takes(function: Any, *names: str) -> bool:
    """Whether this is a function whose first parameters have these names."""
    return inspect.isfunction(function) and tuple(inspect.signature(function).parameters)[: len(names)] == names


def _is_on() -> bool:
    return os.environ.get(SWITCH) != "0"


def _is_legacy_dolly(configuration: Any, model: str, revision: str | None) -> bool:
    """Whether a repository's configuration.json demands code, and its other files are those of a dolly-v2; logs it.

    Args:
        configuration: of the repository, a mapping or ModelScope's Config.
        model: directory or hub id; of a hub id the files that decide are downloaded.
        revision: of the hub id.
    """
    demanded = [key for key in ("allow_remote", "plugins") if configuration and configuration.get(key)]
    if not demanded or not _is_dolly(model, revision):
        return False
    log.warning(
        "%s: its %s demands code (%s). It is a dolly-v2, which needs none: modelscope_dolly loads it and runs no "
        "code of the repository. %s=0 in the environment turns this off",
        model, _CONFIGURATION, ", ".join(demanded), SWITCH,
    )  # fmt: skip
    return True


def _is_dolly(model: str, revision: str | None) -> bool:
    """Whether config.json and tokenizer are those of a dolly-v2; the name of the repository does not count."""
    from modelscope_dolly.checkpoint.config import read_config
    from modelscope_dolly.checkpoint.download import locate
    from modelscope_dolly.checkpoint.tokenizer import check_vocabulary, read_tokenizer

    try:
        config = read_config(locate(model, revision, ["config.json"]))
        directory = locate(model, revision, ["config.json", *_TOKENIZER_FILES])
        check_vocabulary(directory, config, read_tokenizer(directory))
    except DollyError as error:
        log.debug("%s: left to ModelScope, for it is not a dolly-v2: %s", model, error)
        return False
    return True


def _read_configuration(model: str, revision: str | None) -> Mapping[str, Any]:
    """The configuration.json of a directory or hub id; empty where there is none that can be read."""
    from modelscope_dolly.checkpoint.download import locate
    from modelscope_dolly.files import read_json

    try:
        return read_json(locate(model, revision, [_CONFIGURATION]) / _CONFIGURATION)
    except DollyError:
        return {}


def _download(model: str, revision: str | None, options: dict[str, Any]) -> str:
    """A directory with the files that are needed; a hub id stays one if the caller has said what not to download.

    Args:
        options: of the caller; Python files are added to what they leave out.

    Raises:
        CheckpointError: the files cannot be downloaded.
    """
    from modelscope_dolly.checkpoint.download import locate

    if os.path.exists(model):
        return model
    if ignored := options.get("ignore_file_pattern"):
        options["ignore_file_pattern"] = [*([ignored] if isinstance(ignored, str) else ignored), "*.py"]
        return model
    return str(locate(model, revision))


def _our_configuration() -> str:
    from modelscope_dolly.checkpoint.writer import CONFIGURATION

    return str(CONFIGURATION)
