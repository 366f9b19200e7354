"""Packaging of modelscope-dolly: the plugin is installed, the recipe in train/ runs from a checkout."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent

# Why each dependency is there, and why others are not: docs/decisions.md
RUN = [
    "modelscope[framework]>=1.40",
    "torch>=2.11",
    "transformers>=5",
    "accelerate>=1.0",
    "safetensors>=0.5",
    "tokenizers>=0.22",
    "psutil>=5.9",
    "tqdm>=4.60",
]
TRAIN = ["deepspeed>=0.18", "peft>=0.17", "tensorboard>=2.16", "matplotlib>=3.8", "PyYAML>=6"]
TRAIN += ["datasets>=3", "pyarrow>=18"]  # records from a hub, and in parquet files
EVAL = ["lm_eval[hf]>=0.4.13,<0.5", "datasets>=3", "matplotlib>=3.8", "numpy>=1.26", "jinja2>=3"]
GGUF = ["gguf>=0.19"]  # for dolly export
SERVE = ["starlette>=0.46", "uvicorn>=0.34", "prometheus-client>=0.21"]  # for dolly serve
WEB = ["gradio>=6"]  # for dolly web
STRUCTURED = ["llguidance>=1"]  # for answers that fit a regex or a JSON schema
QLORA = ["bitsandbytes>=0.48"]  # for lora with bits: 4 or 8
DEV = ["pytest>=8", "pytest-xdist>=3", "hypothesis>=6", "ruff>=0.14", "markdown-it-py>=3", "setuptools>=64", "wheel"]
DEV += ["openai>=2", "playwright>=1.50", "nbclient>=0.10", "nbformat>=5", "ipykernel>=6", "jsonschema>=4"]
DEV += ["tenacity>=8"]  # lm-eval's client of servers
# Runs the GPU kernels on a CPU, and compiles them where there is no GPU; torch for CUDA brings it along.
DEV += ['triton>=3.5; platform_system == "Linux"']

# Optional: without a compiler the package installs all the same and computes with torch. It is no Python module but a
# plain library (modelscope_dolly/kernels.py loads it), so it serves every Python version it is built beside.
KERNELS = Extension(
    "modelscope_dolly.kernels._kernels",
    [f"modelscope_dolly/kernels/csrc/{name}.c" for name in ("linear", "attention")],
    depends=[f"modelscope_dolly/kernels/csrc/{name}.h" for name in ("kernels", "vector", "attention_level")],
    extra_compile_args=["-O3", "-g0", "-fopenmp"],
    extra_link_args=["-fopenmp"],
    optional=True,
)

setup(
    name="modelscope-dolly",
    version=re.search(r'__version__ = "(.+)"', (HERE / "modelscope_dolly" / "__init__.py").read_text())[1],
    description="Databricks' dolly-v2 for ModelScope: load it with pipeline(), fine-tune it, publish it, measure it",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["modelscope_dolly", "modelscope_dolly.*"]),
    package_data={"modelscope_dolly": ["configuration.json", "kernels/csrc/*"]},
    ext_modules=[KERNELS],
    install_requires=RUN,
    extras_require={
        "serve": SERVE,
        "web": WEB,
        "structured": STRUCTURED,
        "gguf": GGUF,
        "train": TRAIN,
        "qlora": QLORA,
        "eval": EVAL,
        "dev": DEV,
    },
    entry_points={
        "console_scripts": ["dolly = modelscope_dolly.cli:main"],
        "modelscope_hub.cli_plugins": ["dolly = modelscope_dolly.cli:ModelScopeCommand"],
    },
)
