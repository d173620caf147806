"""Variants, seeds, labels, and what a run folder already holds; nothing is started."""

import json
from dataclasses import replace

import pytest
import yaml
from made_runs import finished

from gtr_turbo.checks import ConfigError
from gtr_turbo.cli import main
from gtr_turbo.compare.plan import (
    arguments,
    examine,
    idle,
    make_jobs,
    make_variants,
    read_factors,
    read_seeds,
)
from gtr_turbo.compare.runner import Attempts, last_line
from gtr_turbo.config import TrainConfig
from gtr_turbo.settings import (
    build_config,
    config_file,
    read_config,
    read_overrides,
    with_overrides,
)
from gtr_turbo.teaching_config import BudgetConfig, ExternalConfig


def variants(*vary, over=None):
    return make_variants(config_file("ezpoints"), over or {}, read_factors(vary), threads=1)


@pytest.fixture
def recipe():
    settings = read_config(config_file("ezpoints")) | {"name": "ezpoints"}
    return build_config(TrainConfig, settings)


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", (0, 1, 2)), ("3,7", (3, 7)), ("3,", (3,)), (" 4 , 2 ", (4, 2))]
)
def test_seeds_are_how_many_or_which(text, seeds):
    assert read_seeds(text) == seeds


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1.5", "1,1", "1,,2", "a", "²", "1001", "9" * 5000, "9" * 5000 + ","]
)
def test_other_seeds_are_refused(text):
    with pytest.raises(ConfigError, match="--seeds"):
        read_seeds(text)


def test_the_grid_is_the_product_and_a_group_means_its_switch():
    found = variants("guidance=none,kl", "teacher=ties,linear", "ppo.lr=1e-4,3e-5")
    assert len(found) == 8
    assert [v.label for v in found[:3]] == [
        "guidance=none,teacher=ties,lr=1e-4",
        "guidance=none,teacher=ties,lr=3e-5",
        "guidance=none,teacher=linear,lr=1e-4",
    ]
    last = found[-1].config
    assert (last.guidance.kind, last.teacher.method, last.ppo.lr) == ("kl", "linear", 3e-5)
    assert set(found[0].values) == {"guidance.kind", "teacher.method", "ppo.lr"}
    assert {v.config.name for v in found} == {"ezpoints"}


def test_values_are_yaml_and_other_settings_hold_for_all():
    found = variants("eval.extra_splits=[],[all]", over={"guidance": {"beta": 7.0}})
    assert [v.config.eval.extra_splits for v in found] == [(), ("all",)]
    assert {v.config.guidance.beta for v in found} == {7.0}
    assert [v.config.seed for v in variants()] == [0]
    assert variants()[0].label == "base"


def test_an_environment_comes_without_the_options_of_the_recipes_own():
    there, here = variants("env.id=Points24,EZPoints", over={"eval": {"episodes": 0}})
    assert there.config.env.options == {"prompt": "compact"}
    assert here.config.env.options == read_config(config_file("ezpoints"))["env"]["options"]


def test_labels_are_names_of_folders_and_stay_apart(tmp_path):
    labels = [v.label for v in variants("model.path=a/b,a b,../x,é")]
    assert len(set(labels)) == 4
    assert all(label.isascii() and "/" not in label and " " not in label for label in labels)
    long = variants(f"model.path={'x' * 300},{'x' * 301}")
    assert len({v.label for v in long}) == 2
    assert all(len(v.label) < 100 for v in long)


def test_leaves_of_one_name_keep_their_groups():
    (found,) = variants(
        "guidance.beta=3", "guidance.imitation.weight=1", "teacher.weights=ema", "teacher.alpha=0.3"
    )
    assert found.label == "beta=3,weight=1,weights=ema,alpha=0.3"
    (found,) = variants("save.interval=1", "teacher.interval=2")
    assert found.label == "interval=1,teacher.interval=2"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--vary", "guidance=none,kll"], ["variant guidance=kll", "none, static, kl"]),
        (["--vary", "guidence=none"], ["unknown setting 'guidence'", "Did you mean 'guidance'?"]),
        (["--vary", "ppo.lrr=1"], ["unknown setting 'ppo.lrr'", "Did you mean 'lr'?"]),
        (["--vary", "ppo=1"], ["ppo is a group of settings", "ppo.lr,"]),
        (["--vary", "guidance"], ["--vary 'guidance' must be KEY=VALUE"]),
        (["--vary", "guidance=[kl"], ["cannot be read"]),
        (["--vary", "guidance=kl,kl"], ["names a value twice"]),
        (["--vary", "guidance=kl", "--vary", "guidance.kind=none"], ["given twice"]),
        (["--vary", "guidance.beta=5,5.0"], ["beta=5 and beta=5.0 have the same settings"]),
        (
            ["--vary", "guidance=kl,none", "--guidance.kind", "kl"],
            ["guidance.kind is both varied and given"],
        ),
        (["--vary", "guidance.beta=1,2", "--guidance", "{beta: 3}"], ["both varied and given"]),
        (["--seeds", "30000000"], ["--seeds 30000000 is 30000000 seeds, at most 1000"]),
        (["--vary", "seed=1,2"], ["--seeds"]),
        (["--vary", "env.options.a=2026-01-01,.nan"], ["--vary cannot take the value 2026-01-01"]),
        (["--vary", "teacher.density=0.5,2"], ["variant density=2: teacher.density=2"]),
        (["--seed", "3"], ["--seed cannot be given to compare; see --seeds"]),
        (["--run", "there"], ["--run cannot be given to compare; see --out"]),
        (["--jobs", "0"], ["--jobs 0 must be at least 1"]),
        (["--threads", "0"], ["--threads 0 must be at least 1"]),
        (["--target", "50"], ["--target 50.0 must be a success between 0 and 1"]),
        (["--episodes", "-1"], ["--episodes -1"]),
        (["surplus"], ["cannot read 'surplus'"]),
        (["--vary", "env.options.promptt=full"], ["variant promptt=full: ", "promptt"]),
        (["--env.eval_split", "held-in"], ["variant base: ", "held-in"]),
        (
            ["--vary", "guidance=kl,external", "--guidance.external.key_variable", "NO_SUCH_KEY"],
            ["variant guidance=external: ", "NO_SUCH_KEY is not set"],
        ),
    ],
)
def test_wrong_arguments_are_explained_before_anything_starts(capsys, tmp_path, arguments, parts):
    out = tmp_path / "out"
    assert main(["compare", "ezpoints", "--out", str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gtr-turbo: ")
    for part in parts:
        assert part in error
    assert not out.exists()


def test_a_variant_that_cannot_start_is_told_unless_its_runs_are_finished(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr("gtr_turbo.trackers.installed", lambda name: False)
    out = tmp_path / "out"
    command = ["compare", "ezpoints", "--seeds", "1", "--out", str(out)]
    assert main([*command, "--trackers", "[wandb]", "--dry-run"]) == 2
    assert "variant base: trackers: wandb is not installed" in capsys.readouterr().err
    assert main([*command, "--model.dtype", "bfloat16", "--dry-run"]) == 2
    assert "variant base: model.dtype='bfloat16' cannot be trained" in capsys.readouterr().err
    nothing_evaluated = ["--eval.episodes", "0", "--env.eval_split", "held-in"]
    assert main([*command, *nothing_evaluated, "--dry-run"]) == 0, "no such environment is made"
    lost = ["--guidance.kind", "external", "--guidance.external.key_variable", "NO_SUCH_KEY"]
    assert main([*command, *lost, "--dry-run"]) == 2
    over = {"guidance": {"kind": "external", "external": {"key_variable": "NO_SUCH_KEY"}}}
    finished(out / "base" / "seed0", over=over)
    assert main([*command, *lost]) == 0, "there is nothing to start"


def test_a_finished_run_of_the_same_settings_is_known(tmp_path, recipe):
    run = finished(tmp_path / "run", seed=3)
    wanted = replace(recipe, seed=3, threads=7)  # these change no number
    assert examine(run, wanted) == ("finished", 0)
    stored = yaml.safe_load((run / "config.yaml").read_text()) | {"trackers": ["wandb"]}
    (run / "config.yaml").write_text(yaml.safe_dump(stored))  # of another version
    assert examine(run, wanted) == ("finished", 0)


def test_fields_that_an_older_config_lacks_have_their_defaults(tmp_path, recipe):
    run = finished(tmp_path / "run")
    stored = yaml.safe_load((run / "config.yaml").read_text())
    del stored["guidance"]["center"], stored["save"]["interval"]
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    assert examine(run, recipe)[0] == "finished"
    other = replace(recipe, guidance=replace(recipe.guidance, center=False))
    with pytest.raises(ConfigError, match=r"guidance\.center is True, not False"):
        examine(run, other)


def test_a_weight_of_imitation_that_stays_is_the_same_however_it_was_said(tmp_path, recipe):
    over = {"guidance": {"kind": "sft", "imitation": {"weight_final": 1.0}}}
    run = finished(tmp_path / "run", over=over)
    wanted = replace(recipe, guidance=replace(recipe.guidance, kind="sft"))
    assert wanted.guidance.imitation.weight_final is None
    assert examine(run, wanted)[0] == "finished"


def test_a_folder_with_another_run_is_refused_by_name(tmp_path, recipe):
    run = finished(tmp_path / "run", over={"ppo": {"clip": 0.3}})
    with pytest.raises(ConfigError, match=r"run holds a run with other settings: ppo.clip is 0.3"):
        examine(run, recipe)
    with pytest.raises(ConfigError, match="seed is 0, not 4"):
        examine(finished(tmp_path / "other"), replace(recipe, seed=4))


def test_settings_of_a_guidance_that_is_not_in_use_make_no_other_run(tmp_path, recipe):
    run = finished(tmp_path / "run")
    guidance = recipe.guidance
    elsewhere = replace(guidance.external, model="another")
    more = replace(guidance.imitation, samples=7)
    assert guidance.kind == "kl"
    unread = replace(guidance, external=elsewhere, imitation=more)
    assert examine(run, replace(recipe, guidance=unread))[0] == "finished"
    for kind, name in (("sft", "imitation.samples"), ("external", "external.model")):
        settings = {"guidance": {"kind": kind, "external": {"key_variable": None}}}
        one = finished(tmp_path / kind, over=settings)
        used = replace(unread, kind=kind, external=replace(elsewhere, key_variable=None))
        with pytest.raises(ConfigError, match=rf"guidance\.{name} is "):
            examine(one, replace(recipe, guidance=used))


def test_a_run_goes_on_with_another_way_to_its_corrector_and_a_higher_budget(tmp_path, recipe):
    old = {"kind": "external", "external": {"key_variable": None, "budget": {"calls": 20}}}
    run = finished(tmp_path / "run", over={"guidance": old})
    new = ExternalConfig(
        base_url="http://127.0.0.1:9/v1",
        key_variable="SOME_KEY",
        timeout_s=7.5,
        retries=1,
        backoff_s=0.5,
        concurrency=3,
        outage="wait",
        wait_s=60.0,
        budget=BudgetConfig(calls=40, dollars=1.5, input_price=2.0),
    )
    guidance = replace(recipe.guidance, kind="external", external=new)
    wanted = replace(recipe, guidance=guidance, save=replace(recipe.save, keep=9), trackers=())
    assert examine(run, wanted) == ("finished", 0)
    settings = with_overrides(
        read_config(run / "config.yaml"), read_overrides(arguments(wanted))
    )  # as `train --resume` does
    assert build_config(TrainConfig, settings) == replace(wanted, run=str(run))
    for changed in (replace(new, share=0.5), replace(new, temperature=None)):
        with pytest.raises(ConfigError, match=r"guidance\.external\.(share|temperature) is"):
            examine(run, replace(wanted, guidance=replace(guidance, external=changed)))


def test_what_a_run_does_not_use_is_not_changed_when_it_goes_on(recipe):
    assert arguments(recipe) == ["--trackers", '"auto"', "--save.keep", "2"]


def test_a_config_of_another_version_is_refused_by_name(tmp_path, recipe):
    run = finished(tmp_path / "run")
    with open(run / "config.yaml", "a") as file:
        file.write("from_the_future: 1\n")
    with pytest.raises(
        ConfigError, match=r"run cannot be used \(unknown setting 'from_the_future'"
    ):
        examine(run, recipe)


def test_a_run_without_its_config_is_refused(tmp_path, recipe):
    run = finished(tmp_path / "run")
    (run / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"without its config.yaml"):
        examine(run, recipe)


def test_a_half_finished_folder_goes_on_or_starts_anew(tmp_path, recipe):
    assert examine(tmp_path / "nothing", recipe) == ("new", 0)
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "run.lock").touch()
    assert examine(tmp_path / "locked", recipe) == ("new", 0)
    run = finished(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"env_steps": 256}))
    assert examine(run, recipe) == ("new", 0)  # of a run that was shorter
    (run / "summary.json").write_text('{"cut')
    assert examine(run, recipe) == ("new", 0)  # no checkpoint to go on from
    for name in ("000009", "000010", ".000011.part"):
        (run / "checkpoints" / name).mkdir(parents=True)
    for name in ("000009", "000010"):
        (run / "checkpoints" / name / "state.json").touch()
    assert examine(run, recipe) == ("unfinished", 10)


def test_what_train_cannot_resume_is_refused(tmp_path, recipe):
    run = finished(tmp_path / "run")
    with open(run / "config.yaml", "a") as file:
        file.write("tensorboard: true\n")
    assert examine(run, recipe) == ("finished", 0)
    (run / "summary.json").unlink()
    (run / "checkpoints" / "000002").mkdir(parents=True)
    (run / "checkpoints" / "000002" / "state.json").touch()
    with pytest.raises(ConfigError, match=r"cannot be resumed: its config.yaml has .* tensorboard"):
        examine(run, recipe)


def test_values_that_python_takes_for_equal_stay_apart():
    one, true = variants("env.options.x=1,true")
    assert (one.config.env.options["x"], true.label) == (1, "x=true")


def test_a_setting_of_no_guidance_is_noted():
    found = variants("guidance=none,kl", "guidance.beta=1,5")
    (note,) = idle(found)
    assert note.startswith(
        "guidance.kind is none in guidance=none,beta=1, guidance=none,beta=5: guidance.beta"
    )
    assert idle(variants("guidance=none,kl", "teacher=ties,linear")) == []
    assert idle(variants("guidance.beta=1,5")) == []


def test_runs_are_ordered_seed_by_seed(tmp_path):
    jobs = make_jobs(variants("guidance=none,kl"), (0, 5), tmp_path)
    assert [job.name for job in jobs] == [
        "guidance=none, seed 0", "guidance=kl, seed 0", "guidance=none, seed 5", "guidance=kl, seed 5"
    ]  # fmt: skip
    assert jobs[3].folder == tmp_path / "guidance=kl" / "seed5"


def test_the_last_line_of_a_log_is_one_that_says_something(tmp_path):
    log = tmp_path / "x.log"
    assert last_line(log) == "no log"
    log.write_bytes(b"first\n\x1b[31mred\x1b[0m \x07error \xff\xe2\x80\xae\n\x1b[2K\n\n")
    assert last_line(log) == "red error \ufffd"


def test_a_line_that_a_crash_cut_does_not_take_the_next_one_with_it(tmp_path):
    attempts = Attempts(tmp_path / "attempts.jsonl")
    attempts.call(jobs=1)
    with open(attempts.path, "a") as file:
        file.write('{"event": "call", "jo')
    attempts.call(jobs=2)
    attempts.call(jobs=3)
    assert [call["jobs"] for call in attempts.calls()] == [1, 2, 3]
    assert len(attempts.path.read_text().splitlines()) == 4
