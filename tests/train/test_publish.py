"""Publishing from end to end: the real client, a hub on this machine, and ModelScope's pipeline() as the reader."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from modelscope_dolly import dolly_pipeline
from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.files import read_json
from tests.support.layouts import shard
from tests.support.loopback_http import Fault
from tests.support.loopback_hub import LoopbackHub
from tests.support.loopback_repository import PRIVATE, PUBLIC
from tests.support.publishing import (  # noqa: F401
    ID,
    alone_fixture,
    final_fixture,
    publish,
    retrain,
    sent,
    server_fixture,
    staged_tree,
)
from tests.support.source_imports import imports
from tests.support.training_runs import Processes, complete, needs_deepspeed, write_recipe
from train.publish import main
from train.publishing import hub as hub_module
from train.publishing.publish_settings import PublishSettings
from train.publishing.staging import stage

QUESTION = "Name a colour."


# The whole cycle


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two runs of the recipe."""
    recipes = [write_recipe(tmp_path_factory.mktemp("run"), seed=seed, max_steps=6) for seed in (1, 2)]
    return [complete(recipe).folder / "run" for recipe in recipes]


def test_train_publish_ask_retrain_publish_ask(runs, server, tmp_path, capsys):
    for run, revision in zip(runs, ("v1.0.0", "v1.0.1"), strict=True):
        assert publish(server, run / "final", revision, "--visibility", "private", "--verify-download") == 0
        told = capsys.readouterr()
        assert f"published by tester\n{run}/final.staged: " in told.out and "weights are hard links" in told.out
        assert f"{revision}: 11 files compared by size and sha256" in told.out
        assert "downloaded and compared 11 files; asked" in told.out and "it answers" in told.out
        assert server.token not in told.out + told.err
        assert server.tree(ID, revision) == server.tree(ID) == staged_tree(run / "final")
    assert server.visibility(ID) == PRIVATE and server.tags(ID) == ["v1.0.0", "v1.0.1"]
    program = f"""
    import json
    from modelscope.pipelines import pipeline
    from modelscope.utils.constant import Tasks
    import modelscope_dolly
    for revision in ("v1.0.0", "v1.0.1"):
        pipe = pipeline(Tasks.text_generation, model="{ID}", device="cpu", model_revision=revision)
        print(json.dumps(pipe("{QUESTION}", do_sample=False, max_new_tokens=30)["text"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=server.environ(tmp_path, token=server.token), cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()[-2:]]
    pipes = [dolly_pipeline(str(run / "final"), device="cpu") for run in runs]
    assert answers == [pipe(QUESTION, do_sample=False, max_new_tokens=30)["text"] for pipe in pipes]
    assert answers[0] != answers[1]


def test_the_card_tells_what_the_run_recorded_and_nothing_of_the_account(runs, final, server):
    assert publish(server, runs[0] / "final", "v1.0.0", "--license", "mit") == 0
    card = (runs[0] / "final.staged" / "README.md").read_text()
    data = read_json(runs[0] / "run.json")["starts"][-1]["data"]["sha256"]
    assert data[:16] in card and "license: mit" in card and "v1.0.0" in card
    staged = stage(final, PublishSettings(ID, "v1.0.0")).directory
    assert data[:16] not in (staged / "README.md").read_text() and not (staged / "loss.png").exists()
    assert [path for path in (runs[0] / "final.staged").iterdir() if server.token.encode() in path.read_bytes()] == []


# Again, and other revisions


def test_publishing_again_sends_nothing(final, server, capsys):
    assert publish(server, final) == 0
    before = len(server.requests)
    assert publish(server, final) == 0
    assert sent(server, before) == [] and "is there already, with the same 10 files" in capsys.readouterr().out


def test_an_existing_tag_with_other_content_is_an_error_and_stays(final, server, capsys):
    assert publish(server, final) == 0
    tree = server.tree(ID, "v1.0.0")
    retrain(final)
    before = len(server.requests)
    assert publish(server, final) == 1
    told = capsys.readouterr().err
    assert "v1.0.0 has other content: manifest.json differs, model.safetensors differs" in told
    assert "Trying again does not help: a tag cannot be moved" in told
    assert sent(server, before) == [] and server.tree(ID, "v1.0.0") == server.tree(ID) == tree


def test_what_did_not_change_is_not_sent_again(final, server):
    assert publish(server, final) == 0
    retrain(final)
    before = len(server.requests)
    assert publish(server, final, "v1.0.1") == 0
    new = staged_tree(final)["model.safetensors"][0]
    commit, tag = f"POST /api/v1/repos/models/{ID}/commit/master", f"POST /api/v1/models/{ID}/repo/tag"
    assert sent(server, before) == [f"PUT /lfs/{ID}/{new}", commit, tag]
    assert server.tree(ID, "v1.0.0") != server.tree(ID, "v1.0.1") == staged_tree(final)


def test_a_branch_that_holds_it_already_is_only_tagged(final, server):
    server.fault = lambda index, method, path: Fault("status", 403) if path.endswith("/tag") else None
    assert publish(server, final) == 1
    server.fault, before = lambda index, method, path: None, len(server.requests)
    assert publish(server, final) == 0
    assert sent(server, before) == [f"POST /api/v1/models/{ID}/repo/tag"]


# Stale files


def earlier_revision(server: LoopbackHub, folder: Path, **files: str) -> None:
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)
    server.add_model(ID, {"v0.9.0": folder}, private=True)


def test_stale_files_are_named_and_left(final, server, tmp_path, capsys):
    earlier_revision(server, tmp_path / "old", notes_txt="of last year", _gitattributes="*.safetensors filter=lfs")
    assert publish(server, final) == 0
    assert "left there (--prune removes them): notes.txt\n" in capsys.readouterr().out
    assert set(server.tree(ID, "v1.0.0")) - set(staged_tree(final)) == {"notes.txt", ".gitattributes"}
    before = len(server.requests)
    assert publish(server, final) == 0
    assert sent(server, before) == []


def test_stale_files_are_pruned_on_request_but_not_the_repository_s_own(final, server, tmp_path):
    earlier_revision(server, tmp_path / "old", notes_txt="of last year", _gitattributes="*.safetensors filter=lfs")
    assert publish(server, final, "v1.0.0", "--prune") == 0
    assert set(server.tree(ID, "v1.0.0")) - set(staged_tree(final)) == {".gitattributes"}
    assert len(server.commits(ID)) == 2 + 1, "files come and go in one commit"


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "ms_wrapper.py", "pytorch_model.bin"])
def test_stale_files_that_readers_would_load_are_not_tagged(final, server, tmp_path, capsys, name):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / name).write_text("{}")
    server.add_model(ID, {"v0.9.0": tmp_path / "old"}, private=True)
    assert publish(server, final) == 1
    told = capsys.readouterr().err
    assert name in told and "pass --prune to remove them" in told
    assert sent(server) == [] and server.tags(ID) == ["v0.9.0"]
    assert publish(server, final, "v1.0.0", "--prune") == 0
    assert server.tree(ID, "v1.0.0") == staged_tree(final)


def test_a_writer_in_between_never_ends_in_a_good_exit_code(final, server, tmp_path, capsys):
    stray = shard(final, tmp_path / "stray", shards=2)

    def intrude(index, method, path):
        if path.endswith("/repo/tag"):  # after the branch was compared, before it is tagged
            blobs = {name: server.blobs.add((stray / name).read_bytes()) for name in ("config.json", "manifest.json")}
            server.repositories[ID].commit("master", "somebody else", server.tree(ID) | blobs)

    server.fault = intrude
    assert publish(server, final) == 1
    told = capsys.readouterr().err
    assert "v1.0.0 has other content" in told and "publish under another revision" in told


# Where it goes


@pytest.mark.parametrize(
    ("flags", "visibility"),
    [([], PRIVATE), (["--visibility", "private"], PRIVATE), (["--visibility", "public"], PUBLIC)],
)
def test_a_new_repository_is_private_unless_told_otherwise(final, server, flags, visibility):
    assert publish(server, final, "v1.0.0", *flags) == 0
    assert server.visibility(ID) == visibility
    [create] = [request for request in server.requests if (request.method, request.path) == ("POST", "/api/v1/models")]
    assert create, "and nothing else creates one"


def test_an_existing_repository_must_have_the_visibility_that_is_asked_for(final, server, checkpoint_dir, capsys):
    server.add_model(ID, {"v0.9.0": checkpoint_dir})
    assert publish(server, final, "v1.0.0", "--visibility", "private") == 1
    assert "tester/tiny is public, not private" in capsys.readouterr().err and sent(server) == []
    assert publish(server, final) == 0 and server.visibility(ID) == PUBLIC


@pytest.mark.parametrize(
    "revision", ["master", "HEAD", "main", "", "v 1", "v1/2", "-v1", "v1..2", "v1.lock", "ü", "a" * 40, "v1\n"]
)
def test_a_bad_revision_name_is_refused_before_anything_is_sent(final, server, capsys, revision):
    assert main([str(final), "--model-id", ID, f"--revision={revision}", "--endpoint", server.endpoint]) == 2
    assert "revision is " in capsys.readouterr().err and server.requests == []


@pytest.mark.parametrize("workers", ["0", "-1", str(2**64)])
def test_a_number_of_workers_that_makes_no_sense_is_refused(final, server, capsys, workers):
    assert publish(server, final, "v1.0.0", f"--workers={workers}") == 2
    assert f"--workers is {workers}, it must be at least 1 and at most 64" in capsys.readouterr().err


@pytest.mark.parametrize("model_id", ["tiny", "a/b/c", "/tiny", "te ster/tiny", "tester/../x", "用户/模型"])
def test_a_bad_model_id_is_refused_before_anything_is_sent(final, server, capsys, model_id):
    assert publish(server, final, model_id=model_id) == 2
    assert "model_id is " in capsys.readouterr().err and server.requests == []


def test_a_branch_is_not_taken_for_a_tag(final, server, checkpoint_dir, capsys):
    repository = server.add_model(ID, {"v0.9.0": checkpoint_dir}, private=True)
    repository.commit("dev", "a branch", {})
    assert publish(server, final, "dev") == 1
    assert "dev is a branch" in capsys.readouterr().err


def test_a_checkpoint_that_is_none_is_exit_code_2(server, tmp_path, capsys):
    assert publish(server, tmp_path / "nothing") == 2
    assert "no such directory" in capsys.readouterr().err and sent(server) == []


# Dry run


def test_a_dry_run_tells_everything_and_changes_nothing(final, server, capsys):
    assert publish(server, final, "v1.0.0", "--dry-run") == 0
    told = capsys.readouterr().out
    assert "would create tester/tiny (private)" in told and "would send model.safetensors  1.1 MB" in told
    assert "dry run: 10 files, 1.2 MB at most" in told and {r.method for r in server.requests} == {"GET"}
    assert publish(server, final) == 0
    retrain(final)
    capsys.readouterr()
    assert publish(server, final, "v1.0.1", "--dry-run", "--prune") == 0
    told = capsys.readouterr().out
    assert [line.split()[2] for line in told.splitlines() if "would send" in line] == [
        "README.md",
        "manifest.json",
        "model.safetensors",
    ]
    assert server.tags(ID) == ["v1.0.0"]


# After training


def set_environment(**values: str) -> None:
    os.environ.update(values)


def train_and_publish(
    server: LoopbackHub, folder: Path, token: str | None = None, world: int = 1, **publish
) -> tuple[int, Processes]:
    """A run with a `publish` key; exit code and output of its first process."""
    wish = {"model_id": ID, "revision": "v1.0.0", **publish}
    recipe = write_recipe(folder, max_steps=3, epochs=1, publish=wish)
    environment = {"MODELSCOPE_ENDPOINT": server.endpoint, "MODELSCOPE_HOME": str(folder / "home")}
    environment["MODELSCOPE_API_TOKEN"] = token or server.token
    processes = Processes(recipe, world=world, before=functools.partial(set_environment, **environment))
    return processes.wait()[0], processes


def test_a_recipe_may_end_with_a_published_revision(server, tmp_path):
    code, processes = train_and_publish(server, tmp_path / "it", visibility="public")
    assert code == 0, processes.stdout() + processes.stderr()
    assert server.tree(ID, "v1.0.0") == staged_tree(tmp_path / "it" / "run" / "final")
    assert server.visibility(ID) == PUBLIC
    for text in (processes.stdout(), processes.stderr(), (tmp_path / "it" / "run" / "run.json").read_text()):
        assert server.token not in text


@needs_deepspeed
def test_of_several_processes_the_first_one_publishes(server, tmp_path):
    code, processes = train_and_publish(server, tmp_path / "it", world=2)
    assert code == 0 and processes.ranks[1].exitcode == 0, processes.stderr() + processes.stderr(1)
    assert server.tree(ID, "v1.0.0") == staged_tree(tmp_path / "it" / "run" / "final")
    assert len([request for request in server.requests if "users/me" in request.path]) == 2, "before and after training"


@pytest.mark.parametrize("mistake", ["token", "taken"])
def test_what_would_fail_after_training_is_told_before(server, tmp_path, checkpoint_dir, mistake):
    server.add_model(ID, {"v1.0.0": checkpoint_dir} if mistake == "taken" else {}, private=True)
    code, processes = train_and_publish(server, tmp_path / "it", "no-such-token" if mistake == "token" else None)
    assert code == 1
    says = {"token": "the hub does not accept the token", "taken": "has a revision v1.0.0 already"}[mistake]
    assert says in processes.stderr() and "Traceback" not in processes.stderr()
    assert not (tmp_path / "it" / "run").exists()


def test_a_publish_that_fails_after_training_keeps_the_result_and_says_how_to_go_on(server, tmp_path):
    server.fault = lambda index, method, path: Fault("status", 403) if method == "PUT" else None
    code, processes = train_and_publish(server, tmp_path / "it", prune=True)
    final = tmp_path / "it" / "run" / "final"
    assert code == 1 and manifest.differences(final) == [] and server.tags(ID) == []
    told = processes.stderr().splitlines()[-1]
    assert "has no right" in told and f"{final} is complete; to resume: python -m train.publish {final}" in told
    server.fault = lambda index, method, path: None
    words = told.partition("python -m train.publish ")[2].split()
    assert main([*words, "--endpoint", server.endpoint, "--token", server.token]) == 0
    assert server.tree(ID, "v1.0.0") == staged_tree(final)


def test_few_modules_of_the_recipe_use_the_hub_client_and_only_its_public_modules():
    recipe = Path(hub_module.__file__).parents[1]
    names = {path.stem: {name for name in imports(path) if "modelscope_hub" in name} for path in recipe.rglob("*.py")}
    assert {module for module, used in names.items() if used} == {"hub", "hub_client", "hub_errors", "remote_files"}
    assert [name for used in names.values() for name in used if "._" in name] == []
    talkers = {path.stem for path in recipe.rglob("*.py") if re.search(r"\bapi\.", path.read_text())}
    assert talkers == {"hub", "hub_client"}
