"""dolly-v2 for ModelScope. Importing this package makes `pipeline(Tasks.text_generation, model=...)` find it.

Only entries in ModelScope's index are made, as soon as there is an index; the code behind them is imported when a model
is loaded. Two of ModelScope's functions learn to load the uploads of 2023 without their code, see legacy_uploads.py.
"""

from __future__ import annotations

import sys
from importlib import import_module, util
from typing import Any

__version__ = "0.1.0"

TASK = "text-generation"
CHAT_TASK = "chat"
MODEL_TYPE = "dolly-v2"
PIPELINE_TYPE = "modelscope-dolly"

_PUBLIC = {
    "dolly_pipeline": "pipeline",
    "DollyTextGenerationPipeline": "pipeline",
    "DollyForTextGeneration": "model",
    "DollyError": "errors",
}
__all__ = ["CHAT_TASK", "MODEL_TYPE", "PIPELINE_TYPE", "TASK", "__version__", "register", *_PUBLIC]


_INDEX_MODULE = "modelscope.utils.import_utils"


def register() -> None:
    """Tell ModelScope's lazy index which of our modules to import for our model type and our pipeline type.

    The decorators in model.py and pipeline.py alone would come too late: ModelScope looks a type up in this index
    first, and `Model.from_pretrained` takes transformers' own GPT-NeoX class for a type that is not in it.
    """
    index = import_module(_INDEX_MODULE).LazyImportModule.get_ast_index()["index"]
    for registry, task, name, module in (
        ("MODELS", TASK, MODEL_TYPE, "model"),
        ("PIPELINES", TASK, PIPELINE_TYPE, "pipeline"),
        ("PIPELINES", CHAT_TASK, PIPELINE_TYPE, "pipeline"),
    ):
        index[(registry, task, name)] = {"filepath": "", "imports": [], "module": f"{__name__}.{module}"}


def _hook_legacy_uploads(module: Any) -> None:
    import_module(f"{__name__}.legacy_uploads").install(module)


class _AfterImport:
    """Finder that calls a function right after a module of ModelScope has been imported; goes away after the last.

    Importing ModelScope here instead would cost every user of this package a second of importing torch, `dolly --help`
    and each training process included.

    Args:
        actions: name of a module -> what to call with the module.
    """

    def __init__(self, actions: dict[str, Any]):
        self._actions = actions
        self._searched: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self._actions or name in self._searched:
            return None
        self._searched.add(name)  # the search below comes by here again
        try:
            spec = util.find_spec(name)
        finally:
            self._searched.discard(name)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_act(module: Any) -> None:
            load(module)
            if action := self._actions.pop(name, None):
                action(module)
            if not self._actions and self in sys.meta_path:
                sys.meta_path.remove(self)

        spec.loader.exec_module = load_and_act
        return spec


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _act_now_or_after_import() -> None:
    actions = {
        _INDEX_MODULE: lambda module: register(),
        "modelscope.models.base.base_model": _hook_legacy_uploads,
        "modelscope.pipelines.builder": _hook_legacy_uploads,
    }
    for name in [name for name in actions if name in sys.modules]:
        actions.pop(name)(sys.modules[name])
    if actions:
        sys.meta_path.insert(0, _AfterImport(actions))


_act_now_or_after_import()
