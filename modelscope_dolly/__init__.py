"""dolly-v2 for ModelScope. Importing this package makes `pipeline(Tasks.text_generation, model=...)` find it.

Only two entries in ModelScope's index are made, as soon as there is an index; the code behind them is imported when a
model is loaded.
"""

from __future__ import annotations

import sys
from importlib import import_module, util
from typing import Any

__version__ = "0.1.0"

TASK = "text-generation"
MODEL_TYPE = "dolly-v2"
PIPELINE_TYPE = "modelscope-dolly"

_PUBLIC = {
    "dolly_pipeline": "pipeline",
    "DollyTextGenerationPipeline": "pipeline",
    "DollyForTextGeneration": "model",
    "DollyError": "errors",
}
__all__ = ["MODEL_TYPE", "PIPELINE_TYPE", "TASK", "__version__", "register", *_PUBLIC]


_INDEX_MODULE = "modelscope.utils.import_utils"


def register() -> None:
    """Tell ModelScope's lazy index which of our modules to import for our model type and our pipeline type.

    The decorators in model.py and pipeline.py alone would come too late: ModelScope looks a type up in this index
    first, and `Model.from_pretrained` takes transformers' own GPT-NeoX class for a type that is not in it.
    """
    index = import_module(_INDEX_MODULE).LazyImportModule.get_ast_index()["index"]
    for registry, name, module in (("MODELS", MODEL_TYPE, "model"), ("PIPELINES", PIPELINE_TYPE, "pipeline")):
        index[(registry, TASK, name)] = {"filepath": "", "imports": [], "module": f"{__name__}.{module}"}


class _RegisterOnImport:
    """Finder that registers us right after ModelScope's index module has been imported, and then goes away.

    Importing ModelScope here instead would cost every user of this package a second of importing torch, `dolly --help`
    and each training process included.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _INDEX_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_register(module: Any) -> None:
            load(module)
            register()

        spec.loader.exec_module = load_and_register
        return spec


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


if _INDEX_MODULE in sys.modules:
    register()
else:
    sys.meta_path.insert(0, _RegisterOnImport())
