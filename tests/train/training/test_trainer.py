"""The Trainer takes the plan's batches, its gradient and its schedule; its callbacks note, stop and save."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modelscope_dolly.errors import DollyError
from tests.support.models import random_model
from tests.support.training_runs import needs_deepspeed
from train.bench import all_logits_loss
from train.config import build
from train.data.batch_plan import packed_plan
from train.data.collate import IGNORED, PassDataset, packed_batch
from train.data.padded import padded_batch, padded_plan
from train.training import packed_attention as attention
from train.training.callbacks import MetricsFile, SaveAndStop, StopOnBadLoss
from train.training.loss import CausalLMLoss, response_loss
from train.training.schedule import schedule
from train.training.trainer import DollyTrainer

DRAW = random.Random(3)
LENGTHS = [DRAW.randint(6, 40) for _ in range(37)]
EXAMPLES = [([DRAW.randrange(1, 1024) for _ in range(length)], DRAW.randint(1, length - 1)) for length in LENGTHS]
BATCH = 12  # records of a step; the last step of an epoch has one


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small are faster so, by much where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@needs_deepspeed
@pytest.mark.parametrize("warmup", [1, 2, 5, 50])
def test_warmup_is_deepspeeds_at_every_step(warmup):
    from deepspeed.runtime.lr_schedules import WarmupLR

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = WarmupLR(optimizer, warmup_max_lr=5e-6, warmup_num_steps=warmup)
    ours = schedule("warmup", warmup, 100)
    assert ours(0) == 0.0
    for step in range(100):
        theirs.step(step)
        assert 5e-6 * ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
    assert ours(99) == 1.0


def test_without_warmup_the_rate_is_constant():
    factor = schedule("warmup", 0, 10)
    assert [factor(step) for step in range(10)] == [1.0] * 10


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_cosine_and_linear_rise_to_the_peak_and_end_at_zero(name):
    factor = schedule(name, 10, 110)
    rates = [factor(step) for step in range(111)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0 and rates[60] == pytest.approx(0.5) and rates[110] == pytest.approx(0.0, abs=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert factor(200) == pytest.approx(0.0, abs=1e-12)
    assert schedule(name, 50, 20)(19) == 0.4  # a run shorter than its warm-up


def plans():
    yield packed_plan(LENGTHS, 1, 2, BATCH, 1, 2048), False
    yield packed_plan(LENGTHS, 1, 2, BATCH, 2, 100), False
    yield packed_plan(LENGTHS, 1, 2, BATCH, 3, 2048), False
    yield padded_plan(LENGTHS, 1, 2, BATCH, 2, 3), True


def dataset(plan, padded: bool = False) -> PassDataset:
    return PassDataset(plan, EXAMPLES, 0, padded_batch if padded else packed_batch)


def test_items_are_the_passes_of_the_plan_step_by_step_then_micro_step_then_rank():
    seen = empty = 0
    for plan, padded in plans():
        passes = dataset(plan, padded)
        order = [
            (step, plan.steps[step][rank][micro_step])
            for step in range(len(plan.steps))
            for micro_step in range(plan.accumulation)
            for rank in range(plan.world)
        ]
        assert len(passes) == len(order)
        for item, (step, records) in enumerate(order):
            batch = passes[item]
            learned = batch["labels"][batch["labels"] != IGNORED].tolist()
            assert learned == [token for i in records for token in EXAMPLES[i][0][EXAMPLES[i][1] :]]
            in_step = {record for rank in plan.steps[step] for records in rank for record in records}
            assert batch["label_total"] == sum(LENGTHS[i] - EXAMPLES[i][1] for i in in_step)
            assert records or not batch["input_ids"].any()
            seen, empty = seen + 1, empty + (not records)
    assert seen > 60 and empty > 5


def test_accelerate_deals_each_rank_its_own_passes():
    plan = packed_plan(LENGTHS, 1, 2, BATCH, 3, 60)
    assert plan.accumulation > 1
    items = range(len(dataset(plan)))
    for rank in range(3):
        loader = prepare_data_loader(DataLoader(items, batch_size=1), num_processes=3, process_index=rank)
        assert [int(batch) for batch in loader] == list(items[rank::3])


class Gradients(TrainerCallback):
    """What the optimizer is given, at each step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **keywords):
        self.steps.append({name: parameter.grad.clone() for name, parameter in model.network.named_parameters()})


def network() -> torch.nn.Module:
    return random_model(seed=5, num_hidden_layers=2, hidden_size=32, intermediate_size=64).double()


def make_trainer(folder, plan, padded=False, held_out=(), callbacks=()) -> DollyTrainer:
    model = network()
    model.set_attn_implementation("sdpa" if padded else attention.NAME)
    given = {"model": "m", "dataset": "d", "output_dir": str(folder)}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=len(plan.steps),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=plan.accumulation,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    return DollyTrainer(
        build(given).config,
        dataset(plan, padded),
        0,
        held_out,
        model=CausalLMLoss(model, all_logits_loss if padded else response_loss),
        args=arguments,
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.0), None),  # every step starts from the same weights
        callbacks=list(callbacks),
    )


def direct_loss(model: torch.nn.Module, examples) -> torch.Tensor:
    """Mean over the response tokens of all examples, each run by itself through transformers' own attention."""
    total = 0
    for ids, prompt in examples:
        logits = model(torch.tensor([ids])).logits[0, prompt - 1 : -1]
        total = total + F.cross_entropy(logits, torch.tensor(ids[prompt:]), reduction="sum")
    return total / sum(len(ids) - prompt for ids, prompt in examples)


@pytest.mark.parametrize(
    ("plan", "padded", "accumulation"),
    [
        (packed_plan(LENGTHS, 1, 1, BATCH, 1, 2048), False, 1),
        (packed_plan(LENGTHS, 1, 1, BATCH, 1, 80), False, 4),
        (padded_plan(LENGTHS, 1, 1, BATCH, 1, 3), True, 4),
    ],
    ids=["one pass a step", "several passes a step", "padded"],
)
def test_the_gradient_of_every_step_is_that_of_its_whole_global_batch(tmp_path, plan, padded, accumulation):
    assert plan.accumulation >= accumulation
    gradients = Gradients()
    trainer = make_trainer(tmp_path, plan, padded, callbacks=[gradients])
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(gradients.steps) == len(losses) == len(plan.steps) == math.ceil(len(LENGTHS) / BATCH)
    for step, found, logged in zip(plan.steps, gradients.steps, losses, strict=True):
        model = network()
        loss = direct_loss(model, [EXAMPLES[i] for rank in step for records in rank for i in records])
        loss.backward()
        assert logged == pytest.approx(loss.item(), rel=1e-6)
        pairs = [(found[name], parameter.grad) for name, parameter in model.named_parameters()]
        assert len(pairs) == len(found) > 20
        error = math.sqrt(sum((ours - theirs).square().sum() for ours, theirs in pairs))
        assert error < 1e-6 * math.sqrt(sum(theirs.square().sum() for _, theirs in pairs))


def test_a_dry_run_touches_neither_weights_nor_gradients_nor_random_numbers(tmp_path):
    trainer = make_trainer(tmp_path, packed_plan(LENGTHS, 1, 1, BATCH, 1, 80))
    before = copy.deepcopy(trainer.model.state_dict())
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    trainer.dry_run(trainer.model)
    assert torch.equal(torch.rand(1), expected)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize("padded", [False, True])
def test_evaluation_is_the_mean_over_all_held_out_response_tokens(tmp_path, padded):
    held_out = EXAMPLES[:7]
    make_plan = padded_plan(LENGTHS, 1, 1, BATCH, 1, 3) if padded else packed_plan(LENGTHS, 1, 1, BATCH, 1, 80)
    trainer = make_trainer(tmp_path, make_plan, padded, held_out)
    with torch.no_grad():
        expected = direct_loss(network(), held_out).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.state.log_history[-1]["eval_loss"] == pytest.approx(expected, rel=1e-6)
    means = [direct_loss(network(), [example]).item() for example in held_out]
    assert sum(means) / len(means) != pytest.approx(expected, rel=1e-4)  # records do not count alike, tokens do


def step(number: int, rank: int = 0, world: int = 1):
    """(args, state, control) as a callback gets them."""
    arguments = SimpleNamespace(process_index=rank, world_size=world, device="cpu")
    return arguments, TrainerState(global_step=number, max_steps=100), TrainerControl()


@pytest.fixture
def metrics(tmp_path) -> MetricsFile:
    return MetricsFile(tmp_path / "metrics.jsonl", packed_plan(LENGTHS, 1, 2, BATCH, 1, 2048))


def read(metrics: MetricsFile) -> list[dict]:
    return [json.loads(line) for line in metrics.path.read_text().splitlines()]


def test_metrics_has_a_row_for_each_step_and_each_evaluation(metrics):
    metrics.on_train_begin(*step(0))
    for number in (1, 2):
        metrics.on_log(*step(number), logs={"loss": 2.5, "grad_norm": 0.5, "learning_rate": 1e-5, "epoch": 0.1})
    metrics.on_log(*step(2), logs={"eval_loss": 2.25, "epoch": 0.1})
    metrics.on_log(*step(2), logs={"train_runtime": 3.0})
    first, second, evaluation = read(metrics)
    assert evaluation == {"step": 2, "eval_loss": 2.25}
    for number, row in ((1, first), (2, second)):
        assert (row["step"], row["loss"], row["grad_norm"], row["lr"]) == (number, 2.5, 0.5, 1e-5)
        assert row["tokens"] == metrics.plan.step_tokens[row["step"] - 1]
        assert row["seconds"] >= 0 and row["useful_tokens_per_s"] > 0


def test_metrics_is_cut_back_to_the_step_that_a_run_goes_on_from(metrics):
    for number in range(1, 8):
        metrics.on_log(*step(number), logs={"loss": float(number)})
    metrics.on_log(*step(4), logs={"eval_loss": 9.0})
    with open(metrics.path, "a") as file:
        file.write('{"step": 8, "lo')  # what a kill or a full disk leaves
    metrics.on_train_begin(*step(5))
    assert [row["step"] for row in read(metrics)] == [1, 2, 3, 4, 5, 4]
    metrics.on_log(*step(6), logs={"loss": 6.5})
    assert read(metrics)[-1]["loss"] == 6.5
    metrics.on_train_begin(*step(0))
    assert read(metrics) == []


def test_only_the_first_process_writes_metrics(metrics):
    metrics.on_log(*step(1, rank=1, world=2), logs={"loss": 1.0})
    assert not metrics.path.exists()
    metrics.on_log(*step(1), logs={"loss": 1.0})
    metrics.on_train_begin(*step(0, rank=1, world=2))
    assert len(read(metrics)) == 1


def test_a_disk_without_room_for_metrics_is_told(metrics):
    metrics.path = Path("/dev/full")
    with pytest.raises(DollyError, match=r"/dev/full cannot be written \(.*No space left on device"):
        metrics.on_log(*step(1), logs={"loss": 1.0})


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_three_bad_losses_in_a_row_end_the_run(bad):
    watch = StopOnBadLoss()
    for number, loss in enumerate([2.0, bad, bad, 1.9, bad, bad], 1):  # a good one in between starts the count again
        watch.on_log(*step(number), logs={"loss": loss})
    watch.on_log(*step(6), logs={"eval_loss": bad})
    with pytest.raises(DollyError, match=rf"loss was {bad} for 3 steps in a row, up to step 7; lower learning_rate"):
        watch.on_log(*step(7), logs={"loss": bad})


def test_a_signal_lets_the_step_end_then_saves_and_stops():
    before = signal.getsignal(signal.SIGTERM)
    stopper = SaveAndStop()
    try:
        arguments, state, control = step(3)
        stopper.on_step_end(arguments, state, control)
        assert not (control.should_save or control.should_training_stop or stopper.received)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopper.received and not control.should_save
        stopper.on_step_end(arguments, state, control)
        assert control.should_save and control.should_training_stop
    finally:
        stopper.on_train_end(*step(3))
    assert signal.getsignal(signal.SIGTERM) == before
