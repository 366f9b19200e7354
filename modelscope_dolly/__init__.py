"""dolly-v2 for ModelScope. Importing this package makes `pipeline(Tasks.text_generation, model=...)` find it.

Only two entries in ModelScope's index are made here; the code behind them is imported when a model is loaded.
"""

from __future__ import annotations

from importlib import import_module
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


def register() -> None:
    """Tell ModelScope's lazy index which of our modules to import for our model type and our pipeline type.

    The decorators in model.py and pipeline.py alone would come too late: ModelScope looks a type up in this index
    first, and `Model.from_pretrained` takes transformers' own GPT-NeoX class for a type that is not in it.
    """
    from modelscope.utils.import_utils import LazyImportModule

    index = LazyImportModule.get_ast_index()["index"]
    for registry, name, module in (("MODELS", MODEL_TYPE, "model"), ("PIPELINES", PIPELINE_TYPE, "pipeline")):
        index[(registry, TASK, name)] = {"filepath": "", "imports": [], "module": f"{__name__}.{module}"}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


register()
