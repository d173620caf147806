import pytest
from kitchen import kitchen

from gtr_turbo.envs.household.engine import Engine
from gtr_turbo.envs.household.world import CLEAN, COOL, HEAT, LIGHT, TWO, Pose, Task, visible


def play(engine, *commands):
    """The feedback of the last command; every one must be legal."""
    for command in commands:
        assert command in engine.commands, command
        feedback = engine.step(command)
    return feedback


def test_the_intro_lists_the_room_and_look_in_the_middle_sees_nothing():
    engine = Engine(kitchen())
    assert engine.intro() == (
        "-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. Looking quickly around "
        "you, you see a countertop 1, a desk 1, a fridge 1, a microwave 1, and a sinkbasin 1.\n\n"
        "Your task is to: put a egg in countertop."
    )
    assert play(engine, "look") == (
        "You are in the middle of a room. Looking quickly around you, you see nothing."
    )


def test_in_the_middle_of_the_room_one_can_only_go_and_ask():
    assert Engine(kitchen()).commands == [
        *(f"go to {name} 1" for name in ("countertop", "desk", "fridge", "microwave", "sinkbasin")),
        "help",
        "inventory",
        "look",
    ]


def test_no_receptacle_of_this_place_can_be_gone_to():
    engine = Engine(kitchen())
    assert play(engine, "go to sinkbasin 1") == (
        "You arrive at sinkbasin 1. On the sinkbasin 1, you see a butterknife 1, and a egg 1."
    )
    assert engine.commands == [
        "examine countertop 1",
        "examine sinkbasin 1",
        "go to desk 1",
        "go to fridge 1",
        "go to microwave 1",
        "help",
        "inventory",
        "look",
        "take butterknife 1 from sinkbasin 1",
        "take egg 1 from sinkbasin 1",
        "take mug 1 from countertop 1",
    ]


def test_a_closed_fridge_hides_what_is_in_it_and_cools_all_the_same():
    engine = Engine(kitchen())
    play(engine, "go to sinkbasin 1", "take egg 1 from sinkbasin 1")
    assert play(engine, "go to fridge 1") == "You arrive at fridge 1. The fridge 1 is closed."
    assert "move egg 1 to fridge 1" not in engine.commands
    assert play(engine, "cool egg 1 with fridge 1") == "You cool the egg 1 using the fridge 1."
    assert play(engine, "open fridge 1") == (
        "You open the fridge 1. The fridge 1 is open. In it, you see a egg 2."
    )
    assert "take egg 2 from fridge 1" not in engine.commands  # the hand is full
    assert play(engine, "move egg 1 to fridge 1") == "You move the egg 1 to the fridge 1."
    assert play(engine, "close fridge 1") == "You close the fridge 1."


def test_hot_and_cold_exclude_each_other_and_clean_stays():
    engine = Engine(kitchen())
    take = ("go to sinkbasin 1", "take egg 1 from sinkbasin 1")
    assert play(engine, *take, "examine egg 1") == "There's nothing special about egg 1."
    play(engine, "go to fridge 1", "cool egg 1 with fridge 1")
    assert play(engine, "examine egg 1") == "This is a cold egg 1."
    play(engine, "go to sinkbasin 1", "clean egg 1 with sinkbasin 1")
    assert play(engine, "examine egg 1") == "This is a cool and clean egg 1."
    play(engine, "go to microwave 1", "heat egg 1 with microwave 1")
    assert play(engine, "examine egg 1") == "This is a hot and clean egg 1."
    assert (engine.state.cool, engine.state.hot, engine.state.clean) == (set(), {3}, {3})


def test_a_vessel_tells_what_is_in_it_and_never_its_temperature():
    engine = Engine(kitchen())
    play(engine, "go to countertop 1", "take mug 1 from countertop 1", "go to microwave 1")
    play(engine, "heat mug 1 with microwave 1")
    assert play(engine, "examine mug 1") == (
        "This is a normal mug 1. In it, you see a butterknife 1."
    )


def test_a_knife_slices_what_lies_here_and_reaches_into_closed_receptacles():
    engine = Engine(kitchen())
    play(engine, "go to sinkbasin 1", "take butterknife 1 from sinkbasin 1")
    assert "slice egg 1 with butterknife 1" in engine.commands
    play(engine, "go to fridge 1")
    assert [c for c in engine.commands if c.startswith("slice")] == [
        "slice egg 2 with butterknife 1"
    ]
    assert play(engine, "slice egg 2 with butterknife 1") == (
        "You sliced the egg 2 with the butterknife 1."
    )
    assert engine.state.sliced == {2}


def test_look_remembers_from_where_here_an_object_was_taken():
    engine = Engine(kitchen())
    facing = "You are facing the countertop 1, and sinkbasin 1. Next to it, you see "
    assert play(engine, "go to sinkbasin 1", "look") == f"{facing}nothing."
    play(engine, "take egg 1 from sinkbasin 1", "move egg 1 to countertop 1")
    assert play(engine, "look") == f"{facing}a egg 1."
    play(engine, "take egg 1 from countertop 1", "move egg 1 to sinkbasin 1")
    assert play(engine, "look") == f"{facing}a egg 1."
    play(engine, "take egg 1 from sinkbasin 1")
    assert play(engine, "look") == f"{facing}nothing."


def test_a_lamp_is_used_without_a_hand_and_stays_on():
    engine = Engine(kitchen())
    assert play(engine, "go to desk 1", "use desklamp 1") == "You turn on the desklamp 1."
    assert play(engine, "use desklamp 1") == "You turn on the desklamp 1."
    assert engine.state.on == {1}
    assert not [c for c in engine.commands if c.startswith("take")]


def test_the_hand_is_told():
    engine = Engine(kitchen())
    assert play(engine, "inventory") == "You are not carrying anything."
    play(engine, "go to sinkbasin 1", "take egg 1 from sinkbasin 1")
    assert play(engine, "inventory") == "You are carrying: a egg 1."
    assert engine.commands.count("examine egg 1") == 1


@pytest.mark.parametrize(
    "command", ["", "Look", " look", "go to sinkbasin", "go to sinkbasin 11", "take egg 2", "\x00"]
)
def test_what_is_not_listed_letter_by_letter_changes_nothing(command):
    engine = Engine(kitchen())
    before = engine.commands
    assert engine.step(command) == "Nothing happens."
    assert engine.commands == before


def test_an_older_game_says_put_and_names_locations_and_knows_no_help():
    game = kitchen(put="put {} in/on {}", help=False, locations={Pose(2, 0, 90, 30): "loc 7"})
    engine = Engine(game)
    assert play(engine, "go to sinkbasin 1").startswith("You arrive at loc 7. On the sinkbasin 1,")
    assert "help" not in engine.commands
    play(engine, "take egg 1 from sinkbasin 1")
    assert play(engine, "put egg 1 in/on countertop 1") == (
        "You put the egg 1 in/on the countertop 1."
    )


def test_what_is_visible_is_what_can_be_reached_and_is_not_closed():
    engine = Engine(kitchen())
    assert visible(engine.game, engine.state) == ((), None)
    play(engine, "go to sinkbasin 1")
    here, _ = visible(engine.game, engine.state)
    assert [(s.receptacle, s.closed, s.contents) for s in here] == [
        (4, False, (0, 3)),
        (0, False, (4,)),
    ]
    play(engine, "take egg 1 from sinkbasin 1", "go to fridge 1")
    assert visible(engine.game, engine.state) == (((2, True, ()),), 3)


# -- goal conditions, as ALFRED counts them ------------------------------------------------------


def test_placing_is_one_condition():
    engine = Engine(kitchen())
    play(engine, "go to sinkbasin 1", "take egg 1 from sinkbasin 1")
    assert engine.conditions == (0, 1)
    play(engine, "move egg 1 to countertop 1")
    assert engine.conditions == (1, 1)
    assert engine.won


def test_two_objects_count_in_one_receptacle_only():
    task = Task(type=TWO, object="Egg", receptacle="SinkBasin")
    engine = Engine(kitchen(task))
    assert engine.conditions == (1, 2)
    play(engine, "go to fridge 1", "open fridge 1", "take egg 2 from fridge 1")
    play(engine, "go to sinkbasin 1", "move egg 2 to countertop 1")
    assert engine.conditions == (1, 2)
    play(engine, "take egg 2 from countertop 1", "move egg 2 to sinkbasin 1")
    assert engine.won


def test_light_needs_the_object_in_hand_and_the_lamp_on_and_here():
    engine = Engine(kitchen(Task(type=LIGHT, object="Egg", lamp="DeskLamp")))
    play(engine, "go to desk 1", "use desklamp 1")
    assert engine.conditions == (1, 2)
    play(engine, "go to sinkbasin 1", "take egg 1 from sinkbasin 1")
    assert engine.conditions == (1, 2)  # held, but the lamp is elsewhere
    play(engine, "go to desk 1")
    assert engine.won


@pytest.mark.parametrize(
    ("kind", "where", "treat"),
    [
        (CLEAN, "sinkbasin 1", "clean egg 1 with sinkbasin 1"),
        (HEAT, "microwave 1", "heat egg 1 with microwave 1"),
        (COOL, "fridge 1", "cool egg 1 with fridge 1"),
    ],
)
def test_a_treated_object_elsewhere_and_another_in_place_are_two_of_three(kind, where, treat):
    engine = Engine(kitchen(Task(type=kind, object="Egg", receptacle="CounterTop")))
    play(engine, "go to fridge 1", "open fridge 1", "take egg 2 from fridge 1")
    play(engine, "go to countertop 1", "move egg 2 to countertop 1")
    assert engine.conditions == (1, 3)
    play(engine, "take egg 1 from sinkbasin 1")
    if where not in ("sinkbasin 1",):
        play(engine, f"go to {where}")
    play(engine, treat)
    assert engine.conditions == (2, 3)
    if where not in ("sinkbasin 1",):
        play(engine, "go to countertop 1")
    play(engine, "move egg 1 to countertop 1")
    assert engine.conditions == (3, 3)
    assert engine.won
