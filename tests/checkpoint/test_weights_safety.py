"""Loading runs nothing, holds nothing twice, and needs no file afterwards."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.checkpoint.writer import export_checkpoint
from modelscope_dolly.errors import CheckpointError
from modelscope_dolly.load import load_network
from modelscope_dolly.model import DollyForTextGeneration
from tests.support import layouts
from tests.support.models import random_model
from tests.support.paths import ROOT

QUESTION = "Name three colours of the rainbow."


class _Calls:
    """An object whose pickle calls a function when it is read by an ordinary unpickler."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def _attacks(marker):
    return {
        "os.system": _Calls(os.system, f"touch {marker}"),
        "os.mkdir": _Calls(os.mkdir, str(marker)),
        "exec": _Calls(exec, f"import os; os.mkdir({str(marker)!r})"),
        "Path.touch": _Calls(Path.touch, marker),
    }


@pytest.mark.parametrize("attack", ["os.system", "os.mkdir", "exec", "Path.touch"])
@pytest.mark.parametrize("form", ["zip", "zip, beside good tensors", "zip, as the whole", "old torch", "bare pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(checkpoint_dir, tmp_path, attack, form):
    directory = layouts.copy_2023_layout(checkpoint_dir, tmp_path / "hostile")
    file, marker = directory / "pytorch_model.bin", tmp_path / "marker"
    evil = _attacks(marker)[attack]
    good = torch.load(file, weights_only=True)
    if form == "bare pickle":
        file.write_bytes(pickle.dumps({"a": evil}))
    elif form == "old torch":
        torch.save({"a": evil}, file, _use_new_zipfile_serialization=False)
    else:
        content = {"zip": {"a": evil}, "zip, beside good tensors": {**good, "a": evil}, "zip, as the whole": evil}
        torch.save(content[form], file)
    layouts.refusal(directory, str(file), "not a readable weights file")
    assert not marker.exists()
    # The file is a real trap: an ordinary unpickler falls into it.
    pickle.loads(file.read_bytes()) if form == "bare pickle" else torch.load(file, weights_only=False)
    assert marker.exists()


def test_code_hidden_in_an_otherwise_sound_zip_file_does_not_run(checkpoint_dir, tmp_path):
    directory = layouts.copy_2023_layout(checkpoint_dir, tmp_path / "hostile")
    file, marker = directory / "pytorch_model.bin", tmp_path / "marker"
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    [pickled] = [name for name in records if name.endswith("data.pkl")]
    call = pickle.dumps(_Calls(os.system, f"touch {marker}"), protocol=2)[2:-1]  # without its header and its end
    records[pickled] = records[pickled][:2] + call + b"0" + records[pickled][2:]  # run it, drop what it returned
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    layouts.refusal(directory, str(file), "not a readable weights file")
    assert not marker.exists()
    assert torch.load(file, weights_only=False).keys() and marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(2)],
        torch.zeros(2),
        {"model": {"a": torch.zeros(2)}},
        {"a": "text"},
        {1: torch.zeros(2)},
        {None: torch.zeros(2)},
        {"a": torch.zeros(2, 2).to_sparse()},
        {"a": torch.empty(2, device="meta")},
    ],
    ids=["list", "tensor", "nested", "text", "number as name", "no name", "sparse", "without data"],
)
def test_a_pickle_of_something_else_than_named_tensors_is_refused(checkpoint_dir, tmp_path, content):
    directory = layouts.copy_2023_layout(checkpoint_dir, tmp_path / "other")
    torch.save(content, directory / "pytorch_model.bin")
    layouts.refusal(directory, "pytorch_model.bin", "not a readable weights file", "tensors")


@pytest.mark.parametrize("keep", [0, 0.0001, 0.5, 0.9999])
def test_a_truncated_pickle_is_refused(checkpoint_dir, tmp_path, keep):
    directory = layouts.copy_2023_layout(checkpoint_dir, tmp_path / "cut")
    file = directory / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    layouts.refusal(directory, str(file), "not a readable weights file")


def test_no_code_of_the_directory_is_run(checkpoint_dir, tmp_path):
    directory = layouts.copy_2023_layout(checkpoint_dir, tmp_path / "old")
    traps = sorted(path.name for path in directory.glob("*.py"))
    assert traps == ["instruct_pipeline.py", "ms_wrapper.py"]
    for options in ({}, {"trust_remote_code": True}):
        model = DollyForTextGeneration(str(directory), device="cpu", **options)
        assert set(model.forward(QUESTION, do_sample=False, max_new_tokens=4)) == {"text"}
    assert not {"ms_wrapper", "instruct_pipeline"} & set(sys.modules)
    assert not list(directory.rglob("__pycache__"))


# What a process that loads a directory does, watched from outside


def _run(script, *arguments):
    """Run a script of the project in a process of its own; it prints one line of JSON."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


_MEASURE = """
import json, sys, threading
import torch
from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.load import load_network

def anonymous():  # pages of mapped files, which the system takes back when it needs them, are not among these
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("RssAnon:"))

def watch():
    while not done.wait(0.001):
        seen.append(anonymous())

measured, nets = [], []
for directory in sys.argv[1:]:
    checkpoint = open_checkpoint(directory)
    done, seen, before = threading.Event(), [], anonymous()
    watcher = threading.Thread(target=watch)
    watcher.start()
    nets.append(load_network(checkpoint, torch.bfloat16, {"": "cpu"}))
    seen.append(anonymous())
    done.set()
    watcher.join()
    size = sum(tensor.nbytes for tensor in nets[-1].state_dict().values())  # packed weights are buffers
    measured.append({"size": size, "peak": max(seen) - before, "samples": len(seen)})
print(json.dumps(measured))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory through /proc")
def test_loading_never_holds_a_second_copy_of_the_weights(tokenizer, tmp_path):
    sizes = {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 4096}
    exported = export_checkpoint(random_model(**sizes).bfloat16(), tokenizer, tmp_path / "exported")
    stored = (exported / "model.safetensors").stat().st_size
    assert 150e6 < stored < 250e6  # large enough to stand out from what a process holds anyway
    results = _run(_MEASURE, exported, layouts.copy_2023_layout(exported, tmp_path / "old"))
    assert len(results) == 2
    for measured in results:
        assert measured["size"] == pytest.approx(stored, rel=0.01)
        assert measured["samples"] > 10
        assert measured["size"] <= measured["peak"] < 1.5 * measured["size"], measured


_OUTLIVE = """
import json, sys
from pathlib import Path
from modelscope_dolly.model import DollyForTextGeneration

def answers():
    return [model.forward(question, do_sample=False, max_new_tokens=8)["text"] for model in models]

question, *directories = sys.argv[1:]
models = [DollyForTextGeneration(directory, device="cpu", dtype="fp32") for directory in directories]
files = [path for directory in directories for path in Path(directory).iterdir() if path.is_file()]
for path in files:
    path.write_bytes(b"")
truncated = answers()
for path in files:
    path.unlink()
print(json.dumps({"files": len(files), "truncated": truncated, "removed": answers()}))
"""


def test_a_loaded_model_outlives_its_files(checkpoint_dir, tmp_path):
    # float32 like the files: nothing is converted on the way, which alone would have made a copy.
    model = DollyForTextGeneration(str(checkpoint_dir), device="cpu", dtype="fp32")
    expected = model.forward(QUESTION, do_sample=False, max_new_tokens=8)["text"]
    directories = [
        make(checkpoint_dir, tmp_path / make.__name__) for make in (layouts.plain_hf, layouts.copy_2023_layout)
    ]
    result = _run(_OUTLIVE, QUESTION, *directories)
    assert result["files"] > 10
    assert result["truncated"] == result["removed"] == [expected, expected]


@pytest.mark.parametrize("harm", ["truncated", "removed"])
@pytest.mark.parametrize("layout", ["safetensors", "2023"])
def test_weights_that_go_between_opening_and_loading_are_a_clear_error(checkpoint_dir, tmp_path, layout, harm):
    make = layouts.plain_hf if layout == "safetensors" else layouts.copy_2023_layout
    checkpoint = open_checkpoint(make(checkpoint_dir, tmp_path / "copy"))
    [file] = {file for file, _ in checkpoint.tensors.values()}
    file.write_bytes(b"") if harm == "truncated" else file.unlink()
    with pytest.raises(CheckpointError, match="not a readable weights file"):
        load_network(checkpoint, torch.float32, {"": "cpu"})
