import os
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from gtr_turbo.envs.household import drawing, engine, facts, generator, sprites
from gtr_turbo.envs.household.drawing import draw
from gtr_turbo.envs.household.world import Game, Item, Pose, Receptacle, State, Task

FLAGS = ("hot", "cool", "clean", "sliced", "on")


def furniture(kind, number=1, pose=(0, 0, 0, 0), openable=False):
    name = f"{kind.lower()} {number}"
    return Receptacle(name=name, kind=kind, pose=Pose(*pose), openable=openable)


def item(kind, number=1):
    return Item(name=f"{kind.lower()} {number}", kind=kind, home=None, can=frozenset())


def game(receptacles, objects):
    return Game(
        scene=1,
        room="Kitchen",
        task=Task(type="pick_and_place_simple", object="Mug"),
        sentence="put a mug in shelf",
        receptacles=tuple(receptacles),
        objects=tuple(objects),
        start=Pose(0, 0, 90, 30),
        holds={},
    )


def small():
    """A table, a fridge and a cabinet, and two mugs and an egg on the table, in the fridge and the cabinet."""
    places = [furniture("DiningTable"), furniture("Fridge", 1, (8, 0, 90, 0), True)]
    places.append(furniture("Cabinet", 1, (0, 8, 270, 0), True))
    return game(places, [item("Mug"), item("Mug", 2), item("Egg")])


def state(places, **more):
    return State(places=list(places), **more)


def generated(count, step=1):
    return [
        generator.generate(np.random.default_rng(seed)) for seed in range(0, count * step, step)
    ]


def crowded():
    """A room of 55 receptacles, two digits in many of their names."""
    kinds = ["Cabinet"] * 22 + ["Drawer"] * 14 + ["StoveBurner"] * 4 + ["CounterTop"] * 5
    kinds += [
        "ToiletPaperHanger",
        "HandTowelHolder",
        "CoffeeMachine",
        "CoffeeTable",
        "BathtubBasin",
    ]
    kinds += ["SinkBasin", "SideTable", "DiningTable", "GarbageCan", "LaundryHamper"]
    rng = np.random.default_rng(0)
    poses = [(*rng.integers(-8, 9, 2).tolist(), 90 * int(rng.integers(4)), 30) for _ in kinds]
    made = [furniture(k, kinds[:i].count(k) + 1, poses[i]) for i, k in enumerate(kinds)]
    assert len(made) == 55
    return game(made, [])


def same(a, b):
    return a.tobytes() == b.tobytes()


# The atlas


def test_every_class_of_the_facts_has_a_sprite():
    known = facts.load()
    kinds = {kind for scene in known.scenes.values() for kind in (*scene.kinds, *scene.objects)}
    kinds |= set(known.holds).union(*known.holds.values()).union(*known.can.values())
    assert len(kinds) > 80
    assert {kind for kind in kinds if not kind.endswith("Sliced")} <= set(sprites.cells())


def test_no_two_classes_share_a_sprite_at_any_size_that_is_drawn():
    for size in (48, 16):
        seen = {}
        for kind in sprites.cells():
            paper = Image.new("RGBA", (size, size), (*sprites.PAPER, 255))
            paper.alpha_composite(sprites.sprite(kind, size))
            seen[kind] = np.asarray(paper).astype(int)
            assert (seen[kind][..., :3] != sprites.PAPER).any(axis=2).mean() > 0.1, (
                f"{kind} is empty"
            )
        for a, b in combinations(seen, 2):
            assert np.abs(seen[a] - seen[b]).mean() > 4, (a, b)


def test_the_atlas_is_small_and_its_notice_and_licence_lie_beside_it():
    assert sprites.ATLAS.stat().st_size <= 250_000
    notice = sprites.ATLAS.with_suffix(".NOTICE").read_text("utf-8")
    assert "Apache License, Version 2.0" in notice
    assert "SIL Open Font License" in notice


def test_a_class_without_a_sprite_is_named():
    with pytest.raises(ValueError, match=r"'Unicorn'.*sprites\.txt"):
        sprites.sprite("Unicorn", 20)


def test_a_cut_sprite_differs_from_a_whole_one_for_every_class():
    for kind in sprites.cells():
        whole, cut = (sprites.sprite(kind, 48, cut).tobytes() for cut in (False, True))
        assert whole != cut


# Captions and plans


def test_a_caption_is_the_name_or_as_many_letters_of_each_word_as_fit():
    long = ("CounterTop", "countertop 12")
    assert sprites.caption(*long, 100, 10, True) == "countertop 12"
    assert sprites.caption(*long, 58, 10, True) == "CountTop12"
    assert sprites.caption(*long, 35, 10, True) == "CoTo12"
    assert sprites.caption(*long, 31, 10, True) == "CTp12"
    assert sprites.caption(*long, 25, 10, True) == "CT12"
    assert sprites.caption(*long, 5, 10, True) == "12"
    assert sprites.caption(*long, 100, 10, False) == "12"
    assert sprites.caption("TVStand", "tvstand 1", 30, 10, True) == "TVSt1"


def test_points_at_the_corners_and_the_middle_of_a_room_get_those_slots():
    points = [(0, 0), (8, 0), (0, 6), (8, 6), (4, 3)]
    assert drawing.arrange(points, 3, 3) == ((0, 2), (2, 2), (0, 0), (2, 0), (1, 1))


def test_points_at_one_place_get_different_slots():
    slots = drawing.arrange([(1, 1)] * 12, 4, 3)
    assert sorted(slots) == [(column, row) for column in range(4) for row in range(3)]


def labels_of(of, size, names):
    for whole in (True, False):
        yield drawing.plan(of.receptacles, of.start, size, names, whole)


@pytest.mark.parametrize("size", [300, 448])
def test_labels_of_the_plans_are_legible_apart_inside_and_different(size):
    for of in [*generated(60), crowded()]:
        for plan in labels_of(of, size, True):
            assert len(plan.labels) == len(of.receptacles)
            assert len({label.text for label in plan.labels}) == len(plan.labels)
            for label, receptacle in zip(plan.labels, of.receptacles, strict=True):
                left, top, right, bottom = label.box
                assert label.size >= 10 * size // 300
                assert label.text.endswith(receptacle.name.split()[1])
                assert len(label.text) > len(receptacle.name.split()[1])
                assert left >= 0 <= top
                assert right <= plan.image.width
                assert bottom <= plan.image.height
            for a, b in combinations([label.box for label in plan.labels], 2):
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)


def test_without_names_the_plans_have_numbers_only():
    for of in [*generated(10), crowded()]:
        for plan in labels_of(of, 300, False):
            assert all(label.text.isdigit() for label in plan.labels)


def test_the_plan_shows_where_the_agent_is_and_looks():
    of = small()
    turned = replace(of, start=Pose(0, 0, 180, 30))
    assert not same(draw(of, state([0, 1, 2])), draw(turned, state([0, 1, 2])))
    frames = [draw(of, state([None] * 3, at=at)) for at in (0, 1)]
    north = replace(of.receptacles[0], pose=Pose(0, 0, 180, 0))
    turned = replace(of, receptacles=(north, *of.receptacles[1:]))
    frames.append(draw(turned, state([None] * 3, at=0)))
    plans = {frame[drawing.SCENE :, drawing.HAND :].tobytes() for frame in frames}
    assert len(plans) == 3


# What is hidden does not show


@pytest.mark.parametrize("names", [True, False])
def test_contents_of_closed_receptacles_and_objects_elsewhere_do_not_show(names):
    of = small()
    before = draw(of, state([0, 1, 2], at=1), 300, names)
    for places in ([0, 1, 1], [2, 2, 2], [0, 0, 1], [None, None, None]):
        after = state(
            places, at=1, opened={2}, left={(0, 1)}, **{flag: {0, 1, 2} for flag in FLAGS}
        )
        assert same(draw(of, after, 300, names), before)
    start = draw(of, state([0, 1, 2]), 300, names)
    assert same(draw(of, state([2, 0, 0], opened={1, 2}, hot={0}), 300, names), start)


def test_only_what_is_seen_changes_the_frame_in_generated_games():
    """Everything hidden is stirred: places, states, and classes of objects that the agent does not see."""
    for seed, of in enumerate(generated(30)):
        rng, now = np.random.default_rng(seed), engine.beginning(of)
        now.at = int(rng.integers(len(of.receptacles)))
        now.opened = {i for i, r in enumerate(of.receptacles) if r.openable and rng.random() < 0.5}
        view = drawing.visible(of, now)
        seen = {number for one in view.here for number in one.contents}
        open_here = {one.receptacle for one in view.here if not one.closed}
        elsewhere = [i for i in range(len(of.receptacles)) if i not in open_here]
        frame = draw(of, now)
        hidden = [i for i in range(len(of.objects)) if i not in seen]
        assert hidden
        objects = list(of.objects)
        for i in hidden:
            now.places[i] = int(rng.choice(elsewhere))
            objects[i] = item("Boots", 9)
        for flag in FLAGS:
            getattr(now, flag).update(hidden)
        now.opened ^= {
            i
            for i, r in enumerate(of.receptacles)
            if r.openable and r.pose != of.receptacles[now.at].pose
        }
        other = replace(
            of, objects=tuple(objects), sentence="another", task=Task(type="x", object="y")
        )
        assert same(draw(other, now), frame)


# What is visible does


@pytest.mark.parametrize("names", [True, False])
def test_each_class_in_view_and_in_the_hand_gives_a_frame_of_its_own(names):
    here = [furniture("DiningTable")]
    frames = set()
    for kind in sprites.cells():
        of = game(here, [item(kind)])
        frames.add(draw(of, state([0], at=0), 300, names).tobytes())
        frames.add(draw(of, state([None], at=0, held=0), 300, names).tobytes())
    assert len(frames) == 2 * len(sprites.cells())


@pytest.mark.parametrize("count", [1, 12, 20, 50])
def test_each_state_of_each_object_in_view_shows_in_a_crowd_too(count):
    of = game([furniture("CounterTop")], [item("Mug", i + 1) for i in range(count)])
    places = [0] * count
    frames = [draw(of, state(places, at=0))]
    for flag in FLAGS:
        frames += [draw(of, state(places, at=0, **{flag: {i}})) for i in range(0, count, 7)]
    frames.append(draw(of, state(places, at=0, hot={0}, clean={0}, sliced={0})))
    assert len({frame.tobytes() for frame in frames}) == len(frames)


def test_states_of_the_held_object_show():
    of = small()
    frames = [draw(of, state([0, None, 2], at=0, held=1))]
    frames += [draw(of, state([0, None, 2], at=0, held=1, **{flag: {1}})) for flag in FLAGS]
    frames.append(draw(of, state([0, None, 2], held=1)))
    frames.append(draw(of, state([0, None, 2])))
    assert len({frame.tobytes() for frame in frames}) == len(frames)


@pytest.mark.parametrize("names", [True, False])
def test_open_closed_and_every_class_of_furniture_look_different(names):
    frames = []
    for kind in ("Fridge", "Cabinet", "Drawer", "Microwave", "Safe"):
        of = game([furniture(kind, openable=True)], [])
        frames += [draw(of, state([], at=0, opened=opened), 300, names) for opened in (set(), {0})]
    for kind in ("CounterTop", "DiningTable", "Shelf", "SinkBasin", "Bed", "Sofa", "GarbageCan"):
        frames.append(draw(game([furniture(kind)], []), state([], at=0), 300, names))
    assert len({frame.tobytes() for frame in frames}) == len(frames)


@pytest.mark.parametrize("count", [1, 6, 11, 12, 24, 40, 65])
def test_every_object_of_a_crowd_can_be_seen(count):
    of = game([furniture("CounterTop")], [item("Mug", i + 1) for i in range(count)])
    frame = draw(of, state([0] * count, at=0))
    for i in range(count):
        objects = [*of.objects[:i], item("Apple", i + 1), *of.objects[i + 1 :]]
        changed = draw(game(of.receptacles, objects), state([0] * count, at=0)) != frame
        rows, columns = np.nonzero(changed.any(axis=2))
        assert len(rows) > 30  # pixels
        assert rows.max() < drawing.SCENE
        assert np.ptp(columns) < 110
    other = game(of.receptacles, [item("Mug", 90), *of.objects[1:]])
    for names in (True, False):
        assert not same(
            draw(other, state([0] * count, at=0), 300, names),
            draw(of, state([0] * count, at=0), 300, names),
        )


@pytest.mark.parametrize("count", [2, 3, 4, 7, 12])
def test_all_receptacles_in_reach_are_drawn_with_their_contents(count):
    of = game(
        [furniture("Drawer", i + 1, openable=True) for i in range(count)], [item("Pen")] * count
    )
    opened = set(range(count))
    frame = draw(of, state(range(count), at=0, opened=opened))
    for i in range(count):
        without = state([None if j == i else j for j in range(count)], at=0, opened=opened)
        assert (draw(of, without) != frame)[: drawing.SCENE].any()
        assert (draw(of, state(range(count), at=0, opened=opened - {i})) != frame).any()


# The frame itself


@pytest.mark.parametrize("size", [300, 301, 448, 560])
def test_a_frame_has_the_size_asked_for_and_the_same_bytes_each_time(size):
    of = generated(1)[0]
    now = engine.beginning(of)
    for now.at in (None, 0, len(of.receptacles) - 1):
        frame = draw(of, now, size)
        assert frame.shape == (size, size, 3)
        assert frame.dtype == np.uint8
        drawing.plan.cache_clear()
        sprites.tile.cache_clear()
        sprites.sprite.cache_clear()
        assert same(draw(of, now, size), frame)


def test_another_process_draws_the_same_bytes():
    code = (
        "import numpy, hashlib\n"
        "from gtr_turbo.envs.household import drawing, engine, generator\n"
        "of = generator.generate(numpy.random.default_rng(3))\n"
        "now = engine.beginning(of); now.at = 1\n"
        "print(hashlib.sha256(drawing.draw(of, now).tobytes()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    of = generator.generate(np.random.default_rng(3))
    now = engine.beginning(of)
    now.at = 1
    assert done.stdout.strip() == sha256(draw(of, now).tobytes()).hexdigest()


def test_a_frame_too_small_to_read_is_refused():
    with pytest.raises(ValueError, match="299 pixels is not legible; the least is 300"):
        draw(small(), state([0, 1, 2]), 299)


# -- crowds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [True, False])
def test_the_fullest_game_that_is_played_can_be_drawn_and_a_fuller_one_is_refused(names):
    def crowd(beside, objects):
        shelves = [furniture("Shelf", i + 1) for i in range(beside)]
        return game(shelves, [item("Egg", i + 1) for i in range(objects)])

    def hall(count):
        return game([furniture("Shelf", i + 1, pose=(i, i, 0, 0)) for i in range(count)], [])

    assert draw(hall(100), State(at=None, places=[]), names=names).shape == (300, 300, 3)
    assert "101 receptacles" in drawing.undrawable(hall(101))
    full = crowd(12, 100)
    assert drawing.undrawable(full) == ""
    for place in (lambda i: 0, lambda i: i % 12, lambda i: i // 50):
        state = State(at=0, places=[place(i) for i in range(100)])
        assert draw(full, state, names=names).shape == (300, 300, 3)
    assert "13 receptacles used from one place" in drawing.undrawable(crowd(13, 100))
    assert "101 objects" in drawing.undrawable(crowd(12, 101))
    assert drawing.undrawable(game([], [item("Bogus")])) == "there is no picture of its ['Bogus']"
