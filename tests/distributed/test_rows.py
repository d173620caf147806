"""Which rows of the global batch a rank has, and turns that travel; no second process."""

import json

import torch

from gtr_turbo.collect import Envs, collect
from gtr_turbo.distributed.ranks import Ranks
from gtr_turbo.tracking import rollout_metrics
from gtr_turbo.turns.record import all_turns, from_json, to_json
from tiny import make_policy, scripted, settings


def test_rows_of_a_rank_by_hand():
    """3 turns of 4 environments over 2 ranks: environments 2 and 3 are rank 1's."""
    first, second = Ranks(0, 2), Ranks(1, 2)
    assert first.rows((3, 2)).tolist() == [0, 1, 4, 5, 8, 9]
    assert second.rows((3, 2)).tolist() == [2, 3, 6, 7, 10, 11]
    drawn = torch.tensor([11, 4, 2, 6, 1, 7])
    assert first.own_rows(drawn, (3, 2)).tolist() == [2, 1]  # its rows 4 and 1, in this order
    assert second.own_rows(drawn, (3, 2)).tolist() == [5, 0, 2, 3]
    assert first.most_rows(drawn, (3, 2)) == second.most_rows(drawn, (3, 2)) == 4
    assert Ranks().own_rows(drawn, (3, 4)).tolist() == drawn.tolist()


def test_environments_have_the_same_episodes_on_any_rank(tiny):
    config = settings(tiny).env
    whole, second = Envs(config, "train", 5), Envs(config, "train", 5, 1, 1)
    for envs in (whole, second):
        envs.start()
        envs.reset(len(envs) - 1, 3)
    assert whole.infos[1] == second.infos[0] != whole.infos[0]
    assert (whole.observations[1]["image"] == second.observations[0]["image"]).all()


def test_turns_that_travelled_give_the_same_numbers(tiny, monkeypatch):
    monkeypatch.setattr("gtr_turbo.collect.generate", scripted)
    policy, config = make_policy(tiny), settings(tiny)
    envs = Envs(config.env, "train", 0, 2, 4)
    envs.start()
    turns = collect(envs, policy, config.sampling, config.rollout, torch.Generator().manual_seed(0))
    assert [turn.env_index for turn in turns] == [4, 5, 4, 5]
    travelled = [from_json(json.loads(json.dumps(to_json(turn)))) for turn in turns]
    found = rollout_metrics(travelled, seed=0)
    assert found == rollout_metrics(turns, seed=0)
    assert {"thought/self_bleu", "judge/perception", "thought/surprise"} <= set(found)


def test_turns_of_all_ranks_are_in_the_order_of_one_process(tiny, monkeypatch):
    monkeypatch.setattr("gtr_turbo.collect.generate", scripted)
    policy, config = make_policy(tiny), settings(tiny)
    parts = []
    for first in (0, 2):
        envs = Envs(config.env, "train", 0, 2, first)
        envs.start()
        generator = torch.Generator().manual_seed(0)
        parts.append(collect(envs, policy, config.sampling, config.rollout, generator))

    class Both(Ranks):
        def gather(self, value):
            return [value, [to_json(turn) for turn in parts[1]]]

    order = [(turn.step, turn.env_index) for turn in all_turns(parts[0], Both(0, 2))]
    assert order == [(step, env) for step in range(2) for env in range(4)]
