"""Other engines, measured on the same weights: each in a process of its own, perhaps with another Python.

    python peers.py '{"engine": "hf", "model": "DIR", "prompts": {"1": [[...]]}, ...}'

This file runs under interpreters that have neither this package nor its dependencies: it imports the standard library
at the top, and an engine's own packages where the engine is made. Figures go to standard output, one JSON object per
line: {"phase": text} while it works, {"partial": {...}} with all that is measured so far, {"result": {...}}
at the end.

Two ways of working, both through what a user of the engine would call:
    speed   prompts of equal length in a batch, the same number of new tokens each
    mixed   a list of prompts whose answers differ in length, in static batches
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

#: (prompts, number of new tokens) -> (ids of each answer, seconds from the call until each step was done).
Generate = Callable[[list[list[int]], int], tuple[list[list[int]], list[float]]]


def say(phase: str) -> None:
    print(json.dumps({"phase": phase}), flush=True)


def tell(partial: dict) -> None:
    """What is measured so far: kept if this process is stopped before its end."""
    print(json.dumps({"partial": partial}), flush=True)


def read_job() -> dict:
    """From the command line, or the first line of standard input: the prompts may be too long for the former.

    Where it came from standard input, this process and its children end when that is closed. The parent kills them too;
    but it may itself be killed, or be interrupted before it knows that this process exists.
    """

    def wait() -> None:
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)

    if len(sys.argv) > 1:
        return json.loads(sys.argv[1])
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=wait, daemon=True).start()
    return job


def on_gpu(job: dict) -> bool:
    return job.get("device", "cpu").startswith("cuda")


def peak(job: dict, reset: bool = False) -> int | None:
    """Most bytes since the last reset: of memory, or of GPU memory as torch counts it.

    None for an engine that allocates GPU memory without torch, or in a process of its own.
    """
    if not on_gpu(job):
        return peak_memory(reset)
    cuda = sys.modules["torch"].cuda if "torch" in sys.modules else None
    if cuda is None or not cuda.is_initialized():
        return None
    most = cuda.max_memory_allocated(job["device"])
    if reset:
        cuda.reset_peak_memory_stats(job["device"])
    return most or None


def peak_memory(reset: bool = False) -> int:
    """Most bytes of memory that this process held since the last reset (where the system can reset it), then reset."""
    try:
        status = Path("/proc/self/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return peak
    except (OSError, IndexError):
        return _largest_size(resource.RUSAGE_SELF)


def _largest_size(who: int) -> int:
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def warm_up(job: dict, longest: int) -> int:
    """New tokens of a warm-up: two; on a GPU as many as are measured, since what is compiled there fits one length."""
    return longest if on_gpu(job) else 2


def measure(job: dict, generate: Generate) -> Iterator[dict]:
    """Time `generate` on each batch: a warm-up, then `repeats` times. Seconds, one value per repeat."""
    for batch, prompts in job["prompts"].items():
        say(f"batch {batch}: warm-up")
        generate(prompts, warm_up(job, job["new_tokens"]))
        first, steps, answers = [], [], []
        for number in range(job["repeats"]):
            say(f"batch {batch}: {number + 1} of {job['repeats']}")
            answers, times = generate(prompts, job["new_tokens"])
            first.append(times[0])
            steps.append((times[-1] - times[0]) / max(1, len(times) - 1))
        yield {"batch": int(batch), "first_token_s": first, "step_s": steps, "answers": answers}


def run_mixed(job: dict, generate: Generate) -> dict:
    """Static batches: each works until its longest answer is done. Answers are as long as the job says."""
    requests, size = job["requests"], job["slots"]
    generate([ids for ids, _ in requests[:size]], warm_up(job, max(new for _, new in requests)))
    seconds = []
    for number in range(job["repeats"]):
        start, steps = time.perf_counter(), 0
        for first in range(0, len(requests), size):
            say(f"repeat {number + 1} of {job['repeats']}: {first} of {len(requests)} requests")
            group = requests[first : first + size]
            longest = max(new for _, new in group)
            generate([ids for ids, _ in group], longest)
            steps += longest * len(group)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "slot_steps": steps, "useful_steps": sum(new for _, new in requests)}


def load_hf(job: dict) -> Generate:
    """transformers, `generate`, eager with its default attention; `hf-compile`: static cache and compiled steps."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(job["threads"])
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    # straight onto the GPU: a copy in host memory first may not fit there
    placement = {"": job["device"]} if on_gpu(job) else None
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtypes[job["format"]], device_map=placement).eval()
    options = {"cache_implementation": "static"} if job["engine"] == "hf-compile" else {}

    class Clock(BaseStreamer):
        """Called with the prompts, then with each step's tokens, which are on the host by then."""

        def __init__(self):
            self.times: list[float] = []

        def put(self, value):
            self.times.append(time.perf_counter())

        def end(self):
            pass

    def generate(prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[float]]:
        width = max(map(len, prompts))
        padded = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        clock, start = Clock(), time.perf_counter()
        # eos_token_id=None: random weights may stop anywhere, and all engines must generate as many tokens
        ids = model.generate(
            torch.tensor(padded, device=job["device"]), attention_mask=torch.tensor(mask, device=job["device"]),
            max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, streamer=clock,
            top_p=None, top_k=None, **options,
        )  # fmt: skip
        return ids[:, width:].tolist(), [moment - start for moment in clock.times[1:]]

    return generate


def load_ctranslate2(job: dict) -> Generate:
    """CTranslate2. The checkpoint is converted beside it, once; that needs transformers 4 in the same interpreter."""
    engine = importlib.import_module("ctranslate2")
    compute = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}[job["format"]]
    converted = Path(job["scratch"]) / f"ctranslate2-{compute}"
    if not converted.exists():
        say("converting the checkpoint")
        converters = importlib.import_module("ctranslate2.converters")
        converters.TransformersConverter(job["model"], low_cpu_mem_usage=True).convert(
            str(converted), quantization=compute
        )
        gc.collect()
    peak_memory(reset=True)
    job["began"] = time.perf_counter()
    say("loading")
    device, _, index = job["device"].partition(":")
    model = engine.Generator(
        str(converted), device=device, device_index=int(index or 0), compute_type=compute, inter_threads=1,
        intra_threads=job["threads"],
    )  # fmt: skip
    names = json.loads((converted / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[float]]:
        times: list[float] = []
        start = time.perf_counter()

        def step(result) -> bool:
            if result.step == len(times):
                times.append(0.0)
            times[result.step] = time.perf_counter() - start  # of the last answer of the batch
            return False

        answers = model.generate_batch(
            [[names[token] for token in ids] for ids in prompts], max_length=new, min_length=new, beam_size=1,
            sampling_topk=1, include_prompt_in_result=False, end_token=[], callback=step,
        )  # fmt: skip
        return [answer.sequences_ids[0] for answer in answers], times

    return generate


def load_vllm(job: dict) -> Generate:
    """vLLM. Its time to first token is that of a whole call for one token."""
    engine = importlib.import_module("vllm")
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[job["format"]]
    longest = max(len(ids) for prompts in job["prompts"].values() for ids in prompts) + job["new_tokens"]
    # on the first GPU that this process sees, which is the one that is measured
    model = engine.LLM(model=job["model"], dtype=dtype, max_model_len=longest + 8, enable_prefix_caching=False)

    def call(prompts: list[list[int]], new: int) -> list[list[int]]:
        settings = engine.SamplingParams(temperature=0.0, max_tokens=new, min_tokens=new, ignore_eos=True)
        answers = model.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def generate(prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[float]]:
        start = time.perf_counter()
        call(prompts, 1)
        first = time.perf_counter() - start
        start = time.perf_counter()
        answers = call(prompts, new)
        rest = max(0.0, time.perf_counter() - start - first)
        return answers, [first + rest * number / max(1, new - 1) for number in range(new)]

    return generate


def run_llamacpp(job: dict) -> dict:
    """llama.cpp's own program llama-batched-bench on a GGUF file, which llama.cpp's convert_hf_to_gguf.py writes."""
    most = max(len(prompts) for prompts in job["prompts"].values())
    width = max(len(ids) for prompts in job["prompts"].values() for ids in prompts)
    command = [
        job["program"], "-m", job["gguf"], "-npp", str(width), "-ntg", str(job["new_tokens"]),
        "-npl", ",".join(job["prompts"]), "-t", str(job["threads"]), "-c", str(most * (width + job["new_tokens"]) + 64),
        "--output-format", "jsonl", "-ngl", "999" if on_gpu(job) else "0",
    ]  # fmt: skip
    rows = {int(batch): {"batch": int(batch), "first_token_s": [], "step_s": []} for batch in job["prompts"]}
    for number in range(job["repeats"]):
        say(f"{number + 1} of {job['repeats']}")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                timing = json.loads(line)
                rows[timing["pl"]]["first_token_s"].append(timing["t_pp"])
                rows[timing["pl"]]["step_s"].append(timing["t_tg"] / timing["tg"])
    peak_bytes = None if on_gpu(job) else _largest_size(resource.RUSAGE_CHILDREN)
    return {"rows": list(rows.values()), "peak_bytes": peak_bytes, "version": None}


LOADERS = {"hf": load_hf, "hf-compile": load_hf, "ctranslate2": load_ctranslate2, "vllm": load_vllm}
#: The package without which an engine is not there.
PACKAGES = {"hf": "transformers", "hf-compile": "transformers", "ctranslate2": "ctranslate2", "vllm": "vllm"}
#: Number formats of an engine; the first is measured where nothing else fits what was asked for.
FORMATS = {
    "hf": ("bf16", "fp32", "fp16"),
    "hf-compile": ("bf16", "fp32", "fp16"),
    "ctranslate2": ("int8", "fp32"),
    "vllm": ("bf16", "fp32", "fp16"),
}
#: Formats that an engine knows on a GPU alone.
GPU_FORMATS = {"ctranslate2": ("bf16", "fp16")}


def run(job: dict, load: Callable[[dict], Generate]) -> dict:
    """Load and measure. Seconds and bytes; `load` may set job["began"] again, after what is done only once."""
    peak(job, reset=True)
    job["began"] = time.perf_counter()
    say("loading")
    generate = load(job)
    result = {"load_s": time.perf_counter() - job["began"], "load_peak_bytes": peak(job, reset=True)}
    result["held"] = job.get("held")
    package = PACKAGES.get(job["engine"])
    if package:
        result["version"] = importlib.import_module(package).__version__
    if "requests" in job:
        return result | run_mixed(job, generate) | {"peak_bytes": peak(job)}
    result["rows"] = []
    for row in measure(job, generate):
        result["rows"].append(row)
        result["peak_bytes"] = peak(job)
        tell(result)
    return result


if __name__ == "__main__":
    try:
        given = read_job()
        if given.get("probe"):
            importlib.import_module(PACKAGES[given["engine"]])
        else:
            result = run_llamacpp(given) if given["engine"] == "llamacpp" else run(given, LOADERS[given["engine"]])
            print(json.dumps({"result": result}), flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
