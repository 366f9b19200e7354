"""Many callers of one engine: whatever others ask, come and go, an answer is that of one call alone."""

from __future__ import annotations

import gc
import itertools
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelscope_dolly.engine.engine import CHUNK_ON_CPU, Engine
from modelscope_dolly.engine.sampling import Sampling
from modelscope_dolly.engine.sequence import Request, RunStats
from modelscope_dolly.engine.speculative.prompt_lookup import PromptLookup
from modelscope_dolly.errors import DollyError, HardwareError
from tests.support.models import our_engine, our_network, quantised, random_model

GREEDY = Sampling(do_sample=False)


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(1, 1024, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def request(seed: int, longest: int = 90) -> Request:
    """Greedy or sampled, with or without prompt lookup, ending after 1 to 40 tokens."""
    rng = random.Random(seed)
    sampling = GREEDY if seed % 3 == 0 else Sampling(temperature=1.2, top_p=0.95, seed=seed)
    proposer = PromptLookup if seed % 4 == 0 else None
    ids = random_ids(rng.randint(1, longest), seed)
    return Request(ids, rng.randint(1, 40), sampling, frozenset(range(0, 1024, 40)), proposer=proposer)


@pytest.fixture(scope="module")
def engine(oracle) -> Engine:
    return our_engine(oracle)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return [request(seed) for seed in range(24)]


@pytest.fixture(scope="module")
def alone(engine, requests) -> list[list[int]]:
    return [engine.generate([one])[0] for one in requests]


def in_threads(*jobs) -> None:
    """Run jobs at the same time; the first error of one is raised."""
    errors: list[BaseException] = []

    def guarded(job) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture(scope="module", params=["float32", "int8", "int4"])
def answered(request, engine, requests, alone) -> tuple[Engine, list[Request], list[list[int]]]:
    """An engine in each format, requests, and their answers alone.

    Draft tokens are verified in float32 only: with quantised weights a step over several tokens may round differently.
    """
    if request.param == "float32":
        return engine, requests, alone
    quantised_engine = Engine(quantised(our_network(random_model()), request.param), torch.device("cpu"), 2048)
    asked = [replace(one, proposer=None) for one in requests]
    return quantised_engine, asked, [quantised_engine.generate([one])[0] for one in asked]


@settings(deadline=None, max_examples=12)
@given(st.permutations(range(24)), st.lists(st.integers(1, 5), min_size=3, max_size=9), st.sets(st.integers(0, 8)))
def test_answers_under_load_are_those_of_one_call_alone(answered, order, sizes, leaving):
    """Threads with lists of different lengths and limits, greedy and sampled; some go away in the middle."""
    engine, requests, alone = answered
    groups, begin = [], 0
    for size in sizes:
        groups.append(order[begin : begin + size])
        begin += size

    def ask(number: int, group: list[int]) -> None:
        run = engine.run([requests[i] for i in group], slots=1 + number % 3)
        answers: list[list[int]] = [[] for _ in group]
        for count, token in enumerate(run):
            answers[token.index].append(token.id)
            if number in leaving and count > 5:
                run.close()
                return
        assert answers == [alone[i] for i in group]

    in_threads(*[lambda number=number, group=group: ask(number, group) for number, group in enumerate(groups) if group])
    engine.generate([Request([1], 1)])
    assert engine._state.scheduler.idle


def test_answers_over_weights_held_in_bf16_do_not_depend_on_the_load_either():
    net = quantised(our_network(random_model()), "bf16")
    engine = Engine(net, torch.device("cpu"), 2048)
    asked = [request(seed) for seed in range(1, 12, 2)]
    alone = [engine.generate([one])[0] for one in asked]
    found: dict[int, list[int]] = {}
    in_threads(*[lambda i=i: found.update({i: engine.generate([asked[i]])[0]}) for i in range(len(asked))])
    assert [found[i] for i in range(len(asked))] == alone


def test_a_prompt_of_several_chunks_is_computed_alike_alone_and_beside_others(oracle, engine, requests, alone):
    ids = random_ids(3 * CHUNK_ON_CPU + 17, 5)
    tokens = torch.tensor([ids])
    expected = oracle.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )[0, len(ids) :].tolist()  # fmt: skip
    long = Request(ids, 8, GREEDY)
    assert engine.generate([long]) == [expected]
    found: list[list[int]] = []
    in_threads(
        lambda: found.extend(engine.generate([long])),
        lambda: [engine.generate(requests[:8], 8) for _ in range(2)],
    )
    assert found == [expected]


def test_tokens_of_others_come_while_a_long_prompt_is_read(engine):
    """Between two tokens of a stream at most one chunk of the other prompt is read."""
    steps: list[tuple[int, int]] = []  # tokens, parts of prompts
    hook = engine.net.register_forward_pre_hook(
        lambda net, inputs: steps.append((len(inputs[0]), len(inputs[1].spans or ())))
    )
    stream = engine.run([Request(random_ids(4, 1), 60, GREEDY)])
    try:
        next(stream)
        engine.generate([Request(random_ids(5 * CHUNK_ON_CPU, 2), 2, GREEDY)])
        list(stream)
    finally:
        hook.remove()
    chunks = [place for place, (tokens, parts) in enumerate(steps) if tokens == CHUNK_ON_CPU and parts]
    assert len(chunks) == 5
    between = [steps[a + 1 : b] for a, b in itertools.pairwise(chunks)]
    assert all(len(pair) == 1 and pair[0] == (1, 0) for pair in between)


def test_callers_are_served_in_order_of_arrival_and_a_full_group_lets_others_pass(oracle):
    engine = our_engine(oracle)
    engine.slots = 2
    many = engine.submit([Request(random_ids(5, i), 30, GREEDY) for i in range(6)], slots=1)
    one = engine.submit([Request(random_ids(5, 9), 3, GREEDY)])
    assert len(list(one)) == 3
    assert sum(sequence.finish_reason is not None for sequence in many.sequences) < 6
    assert len(list(many)) == 180


def test_an_error_of_the_device_ends_all_that_runs_with_it_and_the_next_request_works(engine, requests, alone):
    def fail(net, inputs):
        raise torch.OutOfMemoryError("out of memory")

    calls = [engine.submit([requests[i]]) for i in range(3)]
    hook = engine.net.register_forward_pre_hook(fail)
    late = [engine.submit([requests[i]]) for i in range(3)]
    errors = []
    for call in calls + late:
        try:
            list(call)
        except HardwareError as error:
            errors.append(str(error))
    hook.remove()
    assert errors and all("out of memory" in error for error in errors)
    assert engine.generate(requests[:6], 3) == alone[:6]


def test_a_callback_that_raises_ends_its_own_call_alone(engine, requests, alone):
    def fail(token: int) -> bool:
        raise ZeroDivisionError("mine")

    found: list[list[int]] = []

    def bad() -> None:
        with pytest.raises(ZeroDivisionError, match="mine"):
            engine.generate([Request(random_ids(4, 4), 9, GREEDY, on_token=fail), requests[0]], 2)

    in_threads(bad, lambda: found.extend(engine.generate(requests[:4], 2)))
    assert found == alone[:4]


def test_a_request_without_memory_for_its_keys_is_an_error_and_others_go_on(oracle, requests, alone, monkeypatch):
    engine, sizes = our_engine(oracle), [0]

    def free(device: torch.device) -> int:
        cache = engine._state.runner.cache
        sizes.append(cache.slots * cache.length)
        return (600 - sizes[-1]) * engine.net.cache_bytes

    monkeypatch.setattr("modelscope_dolly.engine.runner.free_memory", free)
    with pytest.raises(HardwareError, match="no memory for the keys and values of 1004 tokens; use a smaller max_new"):
        engine.generate([Request(random_ids(1000, 1), 4, GREEDY)])
    assert engine.generate(requests, slots=24) == alone  # fewer at a time
    assert 2 * 64 < max(sizes) <= 600


def test_a_stream_gets_its_tokens_while_another_thread_takes_the_turns(engine):
    """Not all of them at the end, when the other is done."""
    moments: dict[str, list[int]] = {"long": [], "short": []}
    count = iter(range(10**6))
    started = threading.Barrier(2)

    def read(name: str, new: int) -> None:
        started.wait()
        for _ in engine.run([Request(random_ids(5, new), new, GREEDY)]):
            moments[name].append(next(count))

    in_threads(lambda: read("long", 400), lambda: read("short", 40))
    assert max(moments["short"]) < max(moments["long"]) - 200


def test_statistics_are_those_of_the_caller(engine, requests):
    stats = RunStats()
    in_threads(lambda: list(engine.run(requests[:5], 2, stats)), lambda: engine.generate(requests[5:], 4))
    assert stats.prefill_tokens == sum(len(one.ids) for one in requests[:5])
    assert stats.decode_tokens == sum(map(len, engine.generate(requests[:5]))) - 5


def test_nothing_is_there_before_the_first_request_and_no_thread_runs_afterwards(oracle):
    engine, threads = our_engine(oracle), threading.active_count()
    assert engine._state is None
    call = engine.submit([Request([1, 2], 3, GREEDY)])
    assert threading.active_count() == threads and not call.ready  # nothing is computed for nobody
    assert len(list(call)) == 3 and threading.active_count() == threads


def test_an_engine_goes_with_its_last_reference_and_gives_its_cache_back_before(oracle):
    engine = our_engine(oracle)
    engine.generate([Request([1, 2], 3, GREEDY)])
    stream = engine.run([Request([1, 2], 30, GREEDY)])
    next(stream)
    assert engine._state.runner.cache.slots == 1
    stream.close()
    assert engine._state.scheduler.idle and engine._state.runner.cache.slots == 0
    net, threads = weakref.ref(engine.net), threading.active_count()
    del engine, stream
    gc.collect()
    assert net() is None and threading.active_count() == threads


def test_ctrl_c_in_one_call_is_told_to_the_others_and_the_next_request_works(engine, requests, alone):
    def interrupt(net, inputs):
        raise KeyboardInterrupt

    other = engine.submit([requests[0]])
    tokens = iter(other)
    hook = engine.net.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([requests[1]])
    hook.remove()
    with pytest.raises(HardwareError, match="interrupted in the middle of a step"):
        list(tokens)
    assert engine.generate(requests[:3], 3) == alone[:3]


def test_a_forked_process_gets_an_engine_of_its_own(checkpoint_dir):
    """In a process that has not used threads of OpenMP before; the parent's calls cannot be read in the child."""
    code = f"""
import os, sys, torch
from modelscope_dolly.load import load
from modelscope_dolly.engine.sequence import Request
from modelscope_dolly.errors import DollyError
torch.set_num_threads(1)
engine = load({str(checkpoint_dir)!r}, "cpu", "fp32", threads=1).text_generator.engine
asked = [Request([5, 6, 7], 6)]
expected = engine.generate(asked)
call = engine.submit([Request([5, 6], 500)])
begun = iter(call)
next(begun)
child = os.fork()
if child == 0:
    try:
        next(begun)
    except DollyError as error:
        print(error, flush=True)
    os._exit(0 if engine.generate(asked) == expected else 1)
_, status = os.waitpid(child, 0)
assert engine.generate(asked) == expected
print("child", os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "begun before the process was forked" in done.stdout and done.stdout.endswith("child 0\n")


def test_a_process_ends_cleanly_while_an_answer_is_made(checkpoint_dir):
    code = f"""
from modelscope_dolly.load import load
from modelscope_dolly.engine.sequence import Request
engine = load({str(checkpoint_dir)!r}, "cpu", "fp32", threads=1).text_generator.engine
stream = engine.run([Request([5, 6, 7], 2000)])
print(next(stream).id)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.strip().isdigit()


@pytest.fixture
def worker(engine):
    """A thread that takes all turns; yields what it delivers: sets of calls."""
    delivered: queue.Queue[set] = queue.Queue()
    thread = threading.Thread(target=engine.work, args=(delivered.put,))
    thread.start()
    yield delivered
    engine.rest()
    thread.join()


def read(worker: queue.Queue, call) -> list[int]:
    """Tokens of a call that a worker answers, read as a coroutine would: only when it is delivered."""
    ids = []
    while call.open:
        if call in worker.get():
            ids += [token.id for token in call.take()]
    return ids


def test_a_thread_takes_all_turns_for_callers_who_cannot_wait(engine, worker, requests, alone):
    assert [read(worker, engine.submit([requests[i]])) for i in range(4)] == alone[:4]


def test_a_thread_that_takes_all_turns_uses_no_cpu_while_nobody_asks(engine, worker, requests):
    read(worker, engine.submit([requests[0]]))
    engine.generate([requests[1]])  # the turn of the first one has ended
    clock = time.pthread_getcpuclockid(engine._state.worker)
    while engine._state.owner is not None:
        pass
    before = time.clock_gettime(clock)
    assert sum(range(3_000_000)) and time.clock_gettime(clock) - before < 0.02


def test_callers_of_other_threads_only_wait_while_one_takes_all_turns(engine, worker, requests, alone):
    in_step: set[int] = set()
    hook = engine.net.register_forward_pre_hook(lambda net, inputs: in_step.add(threading.get_ident()))
    found: dict[int, list[int]] = {}
    in_threads(*[lambda i=i: found.update({i: engine.generate([requests[i]])[0]}) for i in range(6)])
    hook.remove()
    assert [found[i] for i in range(6)] == alone[:6]
    assert len(in_step) == 1 and threading.get_ident() not in in_step


def test_a_call_that_is_closed_leaves_its_slot_to_the_next_step_of_the_worker(engine, worker):
    call = engine.submit([Request(random_ids(5, 1), 2000, GREEDY)])
    worker.get()
    call.close()
    assert engine.generate([Request(random_ids(5, 2), 2, GREEDY)]) and engine.occupancy == (0, 0)
    assert list(call.take()) == []


def test_open_calls_go_on_when_the_worker_rests_and_a_second_worker_is_refused(engine, requests, alone):
    begun = threading.Event()
    thread = threading.Thread(target=engine.work, args=(lambda calls: begun.set(),))
    thread.start()
    call = engine.submit([Request(random_ids(5, 1), 200, GREEDY)])
    begun.wait()
    with pytest.raises(DollyError, match="another thread takes the turns"):
        engine.work(print)
    engine.rest()
    thread.join()
    assert len(list(call)) == 200
    assert engine.generate(requests[:3], 3) == alone[:3]


def test_a_device_error_reaches_callers_of_a_worker_and_the_next_request_works(engine, worker, requests, alone):
    def fail(net, inputs):
        raise torch.OutOfMemoryError("out of memory")

    hook = engine.net.register_forward_pre_hook(fail)
    with pytest.raises(HardwareError, match="out of memory"):
        read(worker, engine.submit([requests[0]]))
    hook.remove()
    assert read(worker, engine.submit([requests[0]])) == alone[0]


def test_ctrl_c_ends_the_call_of_its_own_thread_and_the_step_is_finished_for_the_others(engine, requests, alone):
    """The signal arrives in the middle of a step of both."""

    def interrupt(net, inputs):
        if len(engine._state.scheduler.running) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    other = engine.submit([requests[0]])
    tokens = iter(other)
    first = next(tokens).id
    hook = engine.net.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([requests[1]])
    hook.remove()
    assert [first, *(token.id for token in tokens)] == alone[0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert engine.generate(requests[:3], 3) == alone[:3]


def test_ctrl_c_interrupts_a_step_of_one_call_alone_at_once(engine, requests, alone):
    layers = []
    hooks = [layer.register_forward_hook(lambda *_: layers.append(1)) for layer in engine.net.gpt_neox.layers]
    hooks.append(engine.net.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        engine.generate([requests[0]])
    for hook in hooks:
        hook.remove()
    assert len(layers) < len(engine.net.gpt_neox.layers)
    assert engine.generate(requests[:3], 3) == alone[:3]


def test_slots_that_were_set_are_not_exceeded_by_a_call_that_asks_for_more(oracle, requests, alone):
    engine = our_engine(oracle)
    engine.slots = 2
    most = []
    engine.net.register_forward_pre_hook(lambda *_: most.append(engine.occupancy[0]))
    assert engine.generate(requests, slots=8) == alone
    assert max(most) == 2


def test_a_request_that_can_never_fit_is_refused_before_others_are_done(oracle, monkeypatch):
    engine = our_engine(oracle)
    call = iter(engine.submit([Request(random_ids(5, 1), 50, GREEDY)]))
    next(call)
    monkeypatch.setattr("modelscope_dolly.engine.runner.free_memory", lambda device: 500 * engine.net.cache_bytes)
    with pytest.raises(HardwareError, match="no memory for the keys and values of 1004 tokens"):
        engine.submit([Request(random_ids(1000, 1), 4, GREEDY)])
    assert len(list(call)) == 49 and engine.capacity(64) == 7
