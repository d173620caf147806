import dataclasses
import json
import re

import numpy as np
import pytest

from gtr_turbo.envs import ContractError, make_env
from gtr_turbo.envs.household import facts, files, naming
from gtr_turbo.envs.household.engine import Engine
from gtr_turbo.envs.household.files import GameError
from gtr_turbo.envs.household.generator import generate, scenes, targets
from gtr_turbo.envs.household.oracle import Oracle, solve
from gtr_turbo.envs.household.world import LIGHT, PLACE, TASKS, TWO, Task

# -- facts ---------------------------------------------------------------------------------------


def test_there_are_120_rooms_of_which_24_are_unseen_and_the_file_is_small():
    known = facts.load()
    assert len(known.scenes) == 120
    assert len(known.held_out) == 24
    assert {1, 6, 201, 306, 401} <= known.held_out
    file = files.Path(facts.__file__).with_name("facts.json")
    assert file.stat().st_size <= 300_000
    assert file.with_name("facts.LICENSE").read_text().startswith("MIT License")


def test_a_bathtub_is_no_sink_and_every_kitchen_cooks_and_cools():
    for scene in facts.load().scenes.values():
        for kind, name, _ in scene.receptacles:
            assert not (name.startswith("Bathtub") and kind != "BathtubBasin")
        if scene.number <= 30:
            assert {"Fridge", "Microwave", "SinkBasin", "StoveBurner"} <= scene.kinds


def test_the_facts_are_those_of_the_wheel():
    pytest.importorskip("alfworld", reason="needs pip install --no-deps alfworld==0.4.2")
    import importlib.util

    path = files.Path(__file__).parents[2] / "benchmarks" / "household_facts.py"
    spec = importlib.util.spec_from_file_location("household_facts", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shipped = json.loads(files.Path(facts.__file__).with_name("facts.json").read_text())
    assert json.loads(json.dumps(module.derive())) == shipped


# -- names ---------------------------------------------------------------------------------------


def test_of_one_class_the_first_id_has_the_highest_number_and_minus_comes_before_plus():
    ids = [
        "Egg|+00.10|+00.90|-01.00",
        "Egg|-00.10|+00.90|-01.00",
        "Sink|+00.00|+00.89|-01.44|SinkBasin",
    ]
    assert naming.names(ids) == {ids[1]: "egg 2", ids[0]: "egg 1", ids[2]: "sinkbasin 1"}


# -- generated games -----------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_generated_games_are_legal_and_not_begun(task):
    rng, known = np.random.default_rng(1), facts.load()
    for _ in range(30):
        game = generate(rng, task=task)
        engine = Engine(game)
        assert game.task.type == task
        assert game.room in known.rooms[task]
        assert engine.conditions[0] == 0
        assert engine.here == ()
        for item in game.objects:
            home = game.receptacles[item.home].kind
            fits = (
                home in ("Desk", "Dresser", "Shelf", "SideTable")
                if item.kind == "DeskLamp"
                else (item.kind in known.holds[home])
            )
            assert fits, (item, home)
            assert (item.kind, home) != (game.task.object, game.task.receptacle)
        wanted = [item for item in game.objects if item.kind == game.task.object]
        assert len(wanted) >= (2 if task == TWO else 1)
        assert len({item.name for item in game.objects}) == len(game.objects)


def test_a_seed_makes_a_game():
    one, other, third = (generate(np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert one == other != third


def test_objects_in_receptacles_close_by_have_ids_of_their_own(tmp_path):
    """Seed 1305: a plunger each in two cabinets that stand an object's step apart."""
    env = make_env("Household-Clean")
    env.reset(seed=1305)
    game = env.unwrapped.engine.game
    assert len({thing.id for thing in game.objects}) == len(game.objects)
    again = files.load(files.export(game, tmp_path, "x", []))
    assert [(t.name, t.home) for t in again.objects] == [(t.name, t.home) for t in game.objects]


def test_splits_share_no_room():
    for task in TASKS:
        train, held_out = set(scenes("train", task)), set(scenes("held-out", task))
        assert train | held_out == set(scenes("all", task))
        assert not train & held_out
        assert held_out <= facts.load().held_out
        assert min(len(train), len(held_out)) >= 5
    rng = np.random.default_rng(0)
    assert {generate(rng, split="held-out").scene for _ in range(40)} <= facts.load().held_out


def test_two_kinds_of_tasks_never_ask_for_what_cannot_be():
    for n in facts.load().scenes:
        for task in targets(n, TWO):
            assert task.receptacle not in ("Toaster", "CoffeeMachine", "TowelHolder")
        for task in targets(n, LIGHT):
            assert (task.receptacle, task.lamp) == ("", "DeskLamp")


def test_rooms_are_about_as_full_as_the_published_ones():
    # 706 published games: 24.8 receptacles (6-55) and 36.0 objects in them (10-65)
    rng = np.random.default_rng(2)
    games = [generate(rng) for _ in range(300)]
    assert 18 < np.mean([len(game.receptacles) for game in games]) < 30
    assert 28 < np.mean([len(game.objects) for game in games]) < 44
    assert max(len(game.objects) for game in games) <= 75


# -- the expert ----------------------------------------------------------------------------------


def test_the_expert_wins_1000_of_1000_games_within_12_commands():
    rng = np.random.default_rng(7)
    longest = 0
    for i in range(1000):
        engine = Engine(generate(rng, task=TASKS[i % 6]))
        commands = solve(engine.game)
        for command in commands:
            assert not engine.won
            assert command in engine.moves
            engine.step(command)
        assert engine.won, engine.game.sentence
        longest = max(longest, len(commands))
    assert 8 <= longest <= 12


def test_the_expert_still_wins_after_30_random_commands():
    rng = np.random.default_rng(8)
    for i in range(120):
        engine = Engine(generate(rng, task=TASKS[i % 6]))
        for _ in range(30):
            commands = engine.commands
            engine.step(commands[rng.integers(len(commands))])
        oracle = Oracle(engine)
        for _ in range(20):
            if engine.won:
                break
            engine.step(oracle.advise().command)
        assert engine.won, engine.game.sentence


def search(game):
    """(the engine, the commands) of an expert that has to search."""
    engine, commands = Engine(game), []
    oracle = Oracle(engine)
    while not engine.won and len(commands) < 2 * len(game.receptacles) + 8:
        oracle.notice()
        commands.append(oracle.advise(search=True).command)
        assert commands[-1] in engine.moves
        engine.step(commands[-1])
    return engine, commands


@pytest.mark.parametrize("task", TASKS)
def test_an_expert_that_searches_wins_and_searches_no_place_twice(task):
    rng = np.random.default_rng(11)
    for _ in range(20):
        engine, commands = search(generate(rng, task=task))
        assert engine.won, engine.game.sentence
        opened = [command for command in commands if command.startswith("open ")]
        assert len(set(opened)) == len(opened)


def test_an_expert_that_searches_does_not_know_what_it_has_not_seen():
    """Wherever the object lies among places that were not seen, the search begins alike."""
    game = generate(np.random.default_rng(4), task=PLACE)
    found = {}
    for place, receptacle in enumerate(game.receptacles):
        if receptacle.kind != game.task.receptacle:
            moved = (
                dataclasses.replace(item, home=place) if item.kind == game.task.object else item
                for item in game.objects
            )
            found[place] = search(dataclasses.replace(game, objects=tuple(moved)))[1]
    longest = max(found.values(), key=len)
    for place, commands in found.items():
        name = game.receptacles[place].name
        at = next(i for i, command in enumerate(commands) if command.startswith("take "))
        assert commands[at].endswith(f" from {name}")
        assert commands[:at] == longest[:at]
    assert len(set(map(len, found.values()))) > 5
    at = next(i for i, command in enumerate(longest) if command.startswith("take "))
    walk = [command[6:] for command in longest[:at] if command.startswith("go to ")]
    openable = {r.name: r.openable for r in game.receptacles}
    assert walk == sorted(walk, key=lambda name: (openable[name], name))


# -- files ---------------------------------------------------------------------------------------


def without_ids(game):
    def bare(things):
        return tuple(dataclasses.replace(thing, id="") for thing in things)

    holds = {r.kind: () for r in game.receptacles}
    return dataclasses.replace(
        game, receptacles=bare(game.receptacles), objects=bare(game.objects), holds=holds
    )


@pytest.mark.parametrize("task", TASKS)
def test_a_game_written_and_read_is_the_same_game(task, tmp_path):
    game = generate(np.random.default_rng(5), task=task)
    path = files.export(game, tmp_path, "x", ["look"])
    again = files.load(path)
    assert without_ids(again) == without_ids(game)
    for i, item in enumerate(game.objects):
        for home in game.receptacles:
            fits = item.kind in game.holds.get(home.kind, ())
            assert fits == (item.kind in again.holds.get(home.kind, ())), (i, home)
    about = json.loads(path.with_name("traj_data.json").read_text())
    assert about["task_type"] == task
    assert about["pddl_params"]["object_target"] == game.task.object
    assert json.loads(path.read_text())["solvable"] is True


def exported(tmp_path, change=lambda data: data):
    path = files.export(generate(np.random.default_rng(0), task=TASKS[3]), tmp_path, "x", [])
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return path


def edit(key, old, new):
    def change(data):
        assert old in data[key]
        return data | {key: data[key].replace(old, new, 1)}

    return change


def drop(pattern):
    """Take the facts out that match."""

    def change(data):
        left, count = re.subn(pattern, "", data["pddl_problem"])
        assert count
        return data | {"pddl_problem": left}

    return change


DAMAGED = {
    "nothing to take": (drop(r"\(pickupable SoapBar_[^)]*\)"), "not enough of SoapBar that can be"),
    "no basin": (
        lambda d: d | {"pddl_problem": d["pddl_problem"].replace("SinkBasinType", "SinkType")},
        "cannot be met: there is not a SinkBasin",
    ),
    "a list": (lambda data: [data], "JSON object with the texts"),
    "no problem": (lambda data: {"grammar": data["grammar"]}, "'grammar' and 'pddl_problem'"),
    "cut off": (lambda data: data | {"pddl_problem": data["pddl_problem"][:-900]}, "ends inside"),
    "too many brackets": (edit("pddl_problem", "(define", ")(define"), "closes a bracket"),
    "deep": (edit("pddl_problem", "(:init", "(:init " + "(" * 60), "deeper than 50"),
    "unknown fact": (edit("pddl_problem", "(:init", "(:init (onFire x)"), r"\['onFire', 'x'\]"),
    "too many arguments": (edit("pddl_problem", "(:init", "(:init (openable a b)"), "openable"),
    "two types": (
        edit("pddl_problem", "(:init", "(:init (objectType o EggType) (objectType o MugType)"),
        "'o' has two types",
    ),
    "in two receptacles": (
        edit("pddl_problem", "(:init", "(:init (inReceptacle o a) (inReceptacle o b)"),
        "two receptacles, which the engine does not play",
    ),
    "a location that is none": (
        edit("pddl_problem", "(:init", "(:init (objectAtLocation o here)"),
        "'here' is not loc",
    ),
    "no receptacle": (
        edit("pddl_problem", "(:init", "(:init (objectType o EggType) (inReceptacle o void)"),
        "'void' has no type",
    ),
    "a far location": (
        edit("pddl_problem", "(:init", "(:init (objectAtLocation o loc_bar_1_bar_2_bar_7_bar_30)"),
        "is not loc",
    ),
    "a long word": (
        edit("pddl_problem", "(:init", "(:init (openable " + "a" * 300 + ")"),
        "a word of",
    ),
    "too many things": (
        edit(
            "pddl_problem",
            "(:init",
            "(:init " + "".join(f"(objectType o{i} EggType)" for i in range(1001)),
        ),
        "more than 1000 receptacles",
    ),
    "an object of no type": (
        edit("pddl_problem", "(:init", "(:init (receptacleType r ShelfType) (inReceptacle o r)"),
        "every receptacle must have|'o' has no type",
    ),
    "another goal": (
        edit("pddl_problem", "isClean ?o", "isSliced ?o"),
        "none of the six task types",
    ),
    "an empty goal": (edit("pddl_problem", "(:goal", "(:goal ()"), "none of the six task types"),
    "another command": (edit("grammar", '"open {r}"', '"unlock {r}"'), "OpenObject"),
    "code in a command": (
        edit("grammar", '"move {o} to {r}"', '"{o.__class__} {r}"'),
        "none of ALFWorld's",
    ),
    "no task": (edit("grammar", "Your task is to: ", ""), "Your task is to"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_game_file_is_told_in_one_sentence(name, tmp_path):
    change, message = DAMAGED[name]
    path = exported(tmp_path, change)
    with pytest.raises(GameError, match=message) as caught:
        files.load(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_class_without_a_picture_is_told_before_the_game_begins(tmp_path):
    def strange(data):
        return data | {"pddl_problem": data["pddl_problem"].replace("CandleType", "BogusType")}

    env = make_env("Household", games=str(exported(tmp_path, strange)))
    with pytest.raises(ContractError, match=r"no picture of its \['Bogus'\]"):
        env.reset(seed=0)


def test_a_game_that_is_won_before_it_begins_is_refused(tmp_path):
    game = generate(np.random.default_rng(0), task=PLACE)
    thing = next(thing for thing in game.objects if "pickup" in thing.can)
    task = Task(type=PLACE, object=thing.kind, receptacle=game.receptacles[thing.home].kind)
    won = dataclasses.replace(game, task=task)
    env = make_env("Household", games=str(files.export(won, tmp_path, "won", [])))
    with pytest.raises(ContractError, match="won before the first command"):
        env.reset(seed=0)


def test_a_file_that_is_no_json_or_missing_or_huge_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "game.tw-pddl"
    with pytest.raises(GameError, match="No such file"):
        files.load(path)
    path.write_text("{" * 5000)
    with pytest.raises(GameError, match=r"cannot play .*game.tw-pddl"):
        files.load(path)
    monkeypatch.setattr(files, "MAX_BYTES", 100)
    with pytest.raises(GameError, match="larger than 100 bytes"):
        files.load(path)


def test_games_compiled_before_alfworld_0_4_are_read_as_they_speak(tmp_path):
    def age(data):
        grammar = data["grammar"].replace("move {o} to {r}", "put {o} in/on {r}")
        grammar = grammar.replace("You arrive at {r.name}", "You arrive at {lend.name}")
        return data | {"grammar": grammar[: grammar.index("action help")]}

    game = files.load(exported(tmp_path, age))
    engine = Engine(game)
    assert "help" not in engine.commands
    assert engine.step(f"go to {game.receptacles[0].name}").startswith("You arrive at loc ")
    assert game.put == "put {} in/on {}"
    assert len(set(game.locations.values())) == len(game.locations)


def test_states_at_the_start_are_read(tmp_path):
    path = exported(tmp_path)
    first = naming.escape(files.load(path).objects[0].id)
    fridge = next(naming.escape(r.id) for r in files.load(path).receptacles if r.openable)
    data = json.loads(path.read_text())
    data["pddl_problem"] = data["pddl_problem"].replace(
        "(:init", f"(:init (isCool {first}) (opened {fridge})", 1
    )
    engine = Engine(files.read(data))
    assert engine.state.cool == {0}
    assert len(engine.state.opened) == 1
    assert (engine.game.scene, engine.game.room) == (0, "Room")


def test_find_leaves_out_what_alfworld_does_not_play(tmp_path):
    for name, solvable in (
        ("a-Egg-None-Shelf-1", "true"),
        ("b-Egg-None-Shelf-1", "false"),
        ("pick_and_place_with_movable_recep-Egg-Mug-Shelf-1", "true"),
        ("c-AppleSliced", "true"),
    ):
        (tmp_path / name / "trial_1").mkdir(parents=True)
        (tmp_path / name / "trial_1" / "game.tw-pddl").write_text(f'{{"solvable": {solvable}}}')
    assert [p.parent.parent.name for p in files.find(tmp_path)] == ["a-Egg-None-Shelf-1"]
    with pytest.raises(
        GameError, match=r"no solvable game.tw-pddl of type pick_two.* \(of 4 there"
    ):
        files.find(tmp_path, TWO)
