"""The configuration of a run: one source of truth for file and flags, and errors that name everything that is wrong."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from modelscope_dolly.errors import SettingError
from train.config import TrainConfig, add_flags, build, flag, resolve

NEEDED = {"model": "base", "dataset": "records.jsonl", "output_dir": "out"}


def from_command(tmp_path, text: str, *flags: str):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser)
    return resolve(parser.parse_args([str(recipe), *flags]))


def test_defaults_are_those_of_the_public_command():
    config = build(NEEDED).config
    assert (config.epochs, config.global_batch_size, config.learning_rate, config.warmup_steps) == (2, 48, 5e-6, 50)
    assert (config.max_length, config.test_size, config.seed, config.gradient_clip) == (2048, 200, 42, 1.0)
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon, config.weight_decay) == (0.9, 0.999, 1e-8, 0.0)


def test_flags_win_over_the_file_and_every_value_knows_its_origin(tmp_path):
    resolved = from_command(
        tmp_path, yaml.safe_dump({**NEEDED, "epochs": 3, "seed": 1}), "--seed", "7", "--lora", "{r: 4}"
    )
    assert (resolved.config.epochs, resolved.config.seed, resolved.config.lora) == (3, 7, {"r": 4})
    assert resolved.origins["epochs"].endswith("recipe.yaml")
    assert resolved.origins["seed"] == "--seed" and resolved.origins["max_length"] == "default"
    table = resolved.table()
    for key in dataclasses.fields(TrainConfig):
        assert f"{key.name} " in table


@pytest.mark.parametrize("text", ["5e-6", "5.0e-6", "0.000005"])
def test_numbers_are_read_as_people_write_them(tmp_path, text):
    assert (
        from_command(tmp_path, f"{{model: a, dataset: b, output_dir: c, learning_rate: {text}}}").config.learning_rate
        == 5e-6
    )
    assert from_command(tmp_path, yaml.safe_dump(NEEDED), "--learning-rate", text).config.learning_rate == 5e-6


def test_a_bare_no_and_a_bare_number_are_the_words_they_look_like(tmp_path):
    config = from_command(tmp_path, "{model: a, dataset: b, output_dir: c, resume: no, zero_stage: 2}").config
    assert (config.resume, config.zero_stage) == ("no", "2")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epochs": 0}, "epochs is 0, it must be at least 1"),
        ({"epochs": "two"}, "epochs is 'two', it must be a whole number"),
        ({"epochs": True}, "epochs is True, it must be a whole number"),
        ({"strict": "maybe"}, "strict is 'maybe', it must be true or false"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast', it must be a number"),
        ({"learning_rate": -1}, "learning_rate is -1.0, it must be above 0"),
        ({"zero_stage": 7}, "zero_stage is 7, it must be one of auto, 0, 1, 2, 3"),
        ({"batching": "padded"}, "batching is no longer a setting: batches are always packed; python -m train.bench"),
        ({"padded_batch_size": 6}, "padded_batch_size is no longer a setting"),
        ({"columns": "q"}, "columns is 'q', it must be {key: value, ...}"),
        ({"lerning_rate": 1}, "Did you mean 'learning_rate'"),
        ({"tokens_per_batch": 100}, "tokens_per_batch is 100, it must be at least max_length - 1 = 2047"),
        ({"model": ""}, "model is missing: set it in the file or with --model"),
        ({"adam_beta1": 1.0}, "adam_beta1 is 1.0"),
        ({"publish": "me/x"}, "publish is 'me/x', it must be {key: value, ...}"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(changes, says):
    with pytest.raises(SettingError) as caught:
        build({**NEEDED, **changes})
    assert says in str(caught.value) and "\n" not in str(caught.value)


WHOLE = [key.name for key in dataclasses.fields(TrainConfig) if key.type == "int"]


@pytest.mark.parametrize("name", WHOLE)
def test_every_whole_number_has_limits_that_are_named(name):
    key = next(key for key in dataclasses.fields(TrainConfig) if key.name == name)
    least, most = key.metadata["limits"]
    assert 0 <= least <= key.default <= most < 2**63
    for value in (least, most):
        build({**NEEDED, "max_length": 1, name: value} | ({"tokens_per_batch": most} if name == "max_length" else {}))
    for value, says in ((least - 1, f"at least {least}"), (most + 1, f"at most {most:,}"), (2**64, "at most")):
        with pytest.raises(SettingError, match=f"{name} is {value}, it must be {says}"):
            build({**NEEDED, name: value})
    with pytest.raises(SettingError, match=f"{name} is a number too large to be shown, it must be a number of at most"):
        build({**NEEDED, name: 10**5000})


@given(
    st.sampled_from([key.name for key in dataclasses.fields(TrainConfig) if key.type == "str"]), st.text(max_size=20)
)
def test_a_flag_of_text_is_taken_as_it_stands(name, text):
    """A path may have any character of YAML; the shell has done all quoting."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as recipe:
        recipe.write(yaml.safe_dump(NEEDED))
        recipe.flush()
        try:
            found = resolve(parser.parse_args([recipe.name, f"{flag(name)}={text}"])).config
        except SettingError as error:
            assert "\n" not in str(error) and name in str(error)
        else:
            assert getattr(found, name) == text


def test_a_recipe_whose_name_is_not_utf8_can_be_printed_and_recorded(tmp_path):
    path = tmp_path / os.fsdecode(b"recipe\xff.yaml")
    path.write_text(yaml.safe_dump(NEEDED))
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser)
    resolved = resolve(parser.parse_args([str(path)]))
    assert resolved.table().encode("utf-8") and "recipe\\udcff.yaml" in resolved.origins["model"]


def test_all_problems_are_told_at_once():
    with pytest.raises(SettingError) as caught:
        build({"epochs": -1, "seed": "x", "output_dri": "a"})
    for part in ("epochs is -1", "seed is 'x'", "output_dir", "model is missing", "dataset is missing"):
        assert part in str(caught.value)


@pytest.mark.parametrize(("text", "says"), [("a: [", "not YAML"), ("- a\n- b", "must hold"), ("", "found nothing")])
def test_a_file_that_is_no_recipe_is_one_line(tmp_path, text, says):
    with pytest.raises(SettingError, match=says) as caught:
        from_command(tmp_path, text)
    assert "\n" not in str(caught.value) and "recipe.yaml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    with pytest.raises(SettingError, match=r"nothing\.yaml: cannot be read"):
        resolve(parser.parse_args([str(tmp_path / "nothing.yaml")]))


def test_no_flag_could_be_taken_for_one_of_torchrun():
    from torch.distributed.run import get_args_parser

    theirs = {option for action in get_args_parser()._actions for option in action.option_strings}
    assert len(theirs) > 20
    ours = [flag(key.name) for key in dataclasses.fields(TrainConfig)]
    spellings = ours + [name.replace("-", "_") for name in ours]
    assert not [(mine, their) for mine in spellings for their in theirs if their.startswith(mine)]


@given(
    st.dictionaries(st.text(max_size=12), st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8))
)
def test_any_values_are_a_configuration_or_a_setting_error(values):
    try:
        resolved = build({**NEEDED, **values})
    except SettingError as error:
        assert "\n" not in str(error) or any("\n" in str(part) for item in values.items() for part in item)
    else:
        assert json.dumps(dataclasses.asdict(resolved.config))


def test_every_recipe_in_the_tree_is_valid():
    from train.config import read_recipe
    from train.nano import RECORDS

    recipes = sorted(RECORDS.parent.glob("*.yaml"))
    assert {path.stem for path in recipes} == {"dolly-v2-3b", "dolly-v2-7b", "dolly-v2-12b", "nano"}
    for path in recipes:
        assert build(read_recipe(path)).config.output_dir.startswith("runs/")
