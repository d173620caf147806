"""SFT guidance: what is trained, what is kept, and that learning from it works."""

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from tokenizers import normalizers

from gtr_turbo.checkpoint import CheckpointError, own_folder
from gtr_turbo.checks import ConfigError
from gtr_turbo.collect import Envs, collect
from gtr_turbo.config import EnvConfig, RolloutConfig, SamplingConfig, SaveConfig, TrainConfig
from gtr_turbo.parsing import parse
from gtr_turbo.policy.scoring import score
from gtr_turbo.settings import build_config
from gtr_turbo.teacher.collection import Memory
from gtr_turbo.teacher.imitation import imitation_loss, splice, teach, write_thoughts
from gtr_turbo.teaching_config import GuidanceConfig, ImitationConfig
from gtr_turbo.trainer import train
from tiny import Silent, inputs_of, make_policy, perturb, scripted, settings

FIELDS = ("cards", "formula", "thoughts", "action")
TEACHER = '{"cards": [2, 6], "formula": "", "thoughts": "2*6=12", "action": "2"}'
AGENT = '{"cards": [3, 6], "formula": "", "thoughts": "3+6=9", "action": "+"}'


@pytest.fixture(scope="module")
def policy(tiny):
    return make_policy(tiny)


@pytest.fixture
def turns(policy, monkeypatch):
    """Four valid turns of EZPoints, by script."""
    monkeypatch.setattr("gtr_turbo.collect.generate", scripted)
    envs = Envs(EnvConfig(options={"prompt": "compact"}, num_envs=2), "train", 0)
    envs.start()
    rollout = RolloutConfig(turns_per_env=2)
    return collect(envs, policy, SamplingConfig(), rollout, torch.Generator().manual_seed(0))


def test_the_weight_changes_from_the_first_update_to_the_last():
    config = ImitationConfig(weight=1.0, weight_final=0.2)
    assert [config.weight_at(n, 5) for n in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert config.weight_at(0, 1) == 1.0
    over = {"guidance": {"kind": "sft", "imitation": {"weight": 0.3}}}
    alone = build_config(TrainConfig, over).guidance.imitation  # as the command builds it
    assert [alone.weight_at(n, 5) for n in range(5)] == pytest.approx([0.3] * 5)


# -- splicing --------------------------------------------------------------------------------------


def test_the_teachers_thought_is_trained_and_the_agents_action_stands_behind_it(policy):
    ids, trained = splice(policy.processor, TEACHER, AGENT, FIELDS)
    text = policy.processor.decode(ids[:-1].tolist())
    assert json.loads(text) == json.loads(TEACHER) | {"action": "+"}
    assert ids[-1] == policy.processor.end_token_id
    # the key ends the thought and is trained with it; what the action is, is not
    assert policy.processor.decode(ids[:trained].tolist()).endswith('"2*6=12", "action": "')
    assert policy.processor.decode(ids[trained:-1].tolist()) == '+"}'


def test_of_a_whole_response_the_teachers_action_is_trained_too(policy):
    ids, trained = splice(policy.processor, TEACHER, AGENT, FIELDS, whole=True)
    assert json.loads(policy.processor.decode(ids[:-1].tolist()))["action"] == "2"
    assert trained == len(ids)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_<|im_end|>end|>", "<|image_<|im_end|>pad|>"])
def test_markup_in_a_thought_is_taken_out_and_moves_nothing(policy, token):
    ids, trained = splice(
        policy.processor, TEACHER.replace("2*6", f"2{token}*6{token}"), AGENT, FIELDS
    )
    plain, as_many = splice(policy.processor, TEACHER, AGENT, FIELDS)
    assert torch.equal(ids, plain)
    assert trained == as_many


@pytest.mark.parametrize("accents", ["cafe\u0301", "e\u0301" * 20, "\u0958" * 3])
def test_a_tokenizer_that_composes_accents_moves_no_boundary(tiny, accents):
    """Qwen's own normalise to NFC: fewer characters for e + U+0301, more for U+0958."""
    processor = make_policy(tiny).processor
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    ids, trained = splice(processor, TEACHER.replace("2*6=12", accents), AGENT, FIELDS)
    assert processor.decode(ids[:trained].tolist()).endswith('", "action": "')
    assert processor.decode(ids[trained:-1].tolist()) == '+"}'
    # an action that would be learned as another one gives no target
    spoken = AGENT.replace('"+"', f'"{accents}"')
    assert splice(processor, TEACHER, spoken, FIELDS) is None


@pytest.mark.parametrize(
    "teacher", ["", "no json", '{"thoughts": "x"', '{"action": "1", "thoughts": "after"}']
)
def test_an_answer_that_cannot_be_read_gives_no_target(policy, teacher):
    assert splice(policy.processor, teacher, AGENT, FIELDS) is None


@pytest.mark.parametrize(
    ("tail", "action"),
    [
        ("'action': '+'}", "+"),
        ('action: "+"}', "+"),
        ('"action": "+",}', "+"),
        ('action: add" "action": "+"}', "+"),
        ("'action': 7}", 7),
        ("'action': 'go \"north\"'}", 'go "north"'),
    ],
)
def test_an_action_that_had_to_be_repaired_is_written_out_as_json(policy, tail, action):
    agent = f'{{"cards": [3, 6], "formula": "", "thoughts": "3+6=9", {tail}'
    ids, trained = splice(policy.processor, TEACHER, agent, FIELDS)
    text = policy.processor.decode(ids[:-1].tolist())
    assert json.loads(text) == json.loads(TEACHER) | {"action": action}
    # what the action is, is not trained
    learned = policy.processor.decode(ids[:trained].tolist())
    assert TEACHER.startswith(learned.removesuffix('"'))
    assert learned.endswith('"action": "' if isinstance(action, str) else '"action": ')


@pytest.mark.parametrize(
    "teacher",
    [
        TEACHER.replace('2*6=12",', '2*6=12"'),
        TEACHER.replace('"thoughts"', "'thoughts'"),
        TEACHER.replace('"thoughts"', "thoughts"),
    ],
)
def test_a_thought_that_is_not_json_before_it_is_repaired_gives_no_target(policy, teacher):
    assert parse(teacher, FIELDS).valid
    for whole in (False, True):
        assert splice(policy.processor, teacher, AGENT, FIELDS, whole=whole) is None


def test_replies_of_strict_json_are_spliced_as_they_stand(policy):
    """White space, a code fence, members behind the action: byte for byte."""
    fence, agent = f"```json\n{TEACHER}\n```", AGENT.replace('"+"}', '"+" , "more":  {}}\n```')
    ids, _ = splice(policy.processor, fence, agent, FIELDS)
    expected = fence.partition('"action"')[0] + '"action"' + agent.partition('"action"')[2]
    assert ids.tolist() == policy.processor.reply_ids(expected).tolist()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("more", [' and then {"cards": 5', "\n```", ' {"action": "7"}', "  "])
def test_a_target_ends_where_its_object_does(policy, more, whole):
    """The end token is trained: behind a ramble it would teach the agent to ramble first."""
    plain = splice(policy.processor, TEACHER, AGENT, FIELDS, whole=whole)
    ids, trained = splice(policy.processor, TEACHER + more, AGENT + more, FIELDS, whole=whole)
    assert (ids.tolist(), trained) == (plain[0].tolist(), plain[1])
    # a code block that the teacher began is closed, and only that
    block = f"```json\n{TEACHER}\n```"
    ids, _ = splice(policy.processor, block, AGENT + more, FIELDS, whole=whole)
    assert policy.processor.decode(ids[:-1].tolist()).endswith("}\n```")


# -- writing ---------------------------------------------------------------------------------------


def replay(answers):
    """In place of `generate`: the given texts in turn; remembers the temperatures it was asked for."""
    asked = []

    def generate(policy, observed, sampling, generator, *, greedy=False, temperature=None):
        from tiny import replies

        asked.append((len(observed), temperature))
        return replies(policy, observed, [answers.pop(0) for _ in observed])

    return generate, asked


def test_unreadable_answers_are_written_again_hotter_and_at_most_so_often(
    policy, turns, monkeypatch
):
    bad = "{}"
    # four turns: two good at once, one good at the second try, one never
    generate, asked = replay([TEACHER, bad, TEACHER, bad, bad, TEACHER, bad, bad])
    monkeypatch.setattr("gtr_turbo.teacher.imitation.generate", generate)
    policy.load_teacher({name: torch.zeros_like(d) for name, d in policy.deltas()})
    config = ImitationConfig(temperature=0.5, temperature_ramp=1.5, temperature_max=0.9, retries=3)
    written = write_thoughts(
        policy, turns, FIELDS, config, SamplingConfig(), torch.Generator(), batch_turns=4
    )
    assert [text is not None for text in written.texts] == [True, False, True, True]
    assert asked == [(4, 0.5), (2, 0.75), (1, 0.9), (1, 0.9)]
    assert written.metrics == {
        "imitation/asked": 4.0,
        "imitation/written": 0.75,
        "imitation/tries": 2.0,
    }


def test_invalid_turns_are_not_asked_about(policy, turns, monkeypatch):
    generate, asked = replay([TEACHER] * 3)
    monkeypatch.setattr("gtr_turbo.teacher.imitation.generate", generate)
    policy.load_teacher({name: torch.zeros_like(d) for name, d in policy.deltas()})
    turns = [replace(turns[0], valid=False), *turns[1:]]
    written = write_thoughts(
        policy, turns, FIELDS, ImitationConfig(), SamplingConfig(), torch.Generator(), batch_turns=8
    )
    assert written.texts[0] is None
    assert asked == [(3, 0.2)]
    none = [replace(turn, valid=False) for turn in turns]
    written = write_thoughts(
        policy, none, FIELDS, ImitationConfig(), SamplingConfig(), torch.Generator(), batch_turns=8
    )
    assert written.metrics == {"imitation/asked": 0.0}, "of no answers there is no share"


def test_the_merge_writes_and_not_the_agent(policy, turns, monkeypatch):
    seen = []

    def generate(policy, observed, *rest, **settings):
        seen.append({n: p.detach().clone() for n, p in policy.trained().items()})
        return scripted(policy, observed, None, torch.Generator().manual_seed(0))

    start = {n: p.detach().clone() for n, p in policy.trained().items()}
    shift = {name: torch.full_like(d, 0.25) for name, d in policy.deltas()}
    policy.load_teacher(shift)
    monkeypatch.setattr("gtr_turbo.teacher.imitation.generate", generate)
    write_thoughts(
        policy, turns, FIELDS, ImitationConfig(), SamplingConfig(), torch.Generator(), batch_turns=8
    )
    for name, weight in seen[0].items():
        assert torch.equal(weight, start[name] + 0.25)
    for name, parameter in policy.trained().items():
        assert torch.equal(parameter, start[name])


# -- the collection --------------------------------------------------------------------------------


def collected(policy, turns, folder, limit=0, updates=(1,)):
    memory = Memory(folder, limit)
    for update in updates:
        made = [splice(policy.processor, TEACHER, t.text, FIELDS) for t in turns]
        memory.add(update, turns, made)
    return memory


def test_targets_come_back_from_the_files_as_they_were(policy, turns, tmp_path):
    memory = collected(policy, turns, tmp_path, updates=(1, 2))
    again = Memory(tmp_path, 0)
    again.restore(2, 8)
    assert len(again) == len(memory) == 8
    for old, new in zip(memory.targets, again.targets, strict=True):
        assert (old.frame, old.prompt, old.thought_tokens) == (
            new.frame,
            new.prompt,
            new.thought_tokens,
        )
        assert torch.equal(old.response_ids, new.response_ids)
    draws = [m.draw(5, torch.Generator().manual_seed(3)) for m in (memory, again)]
    seen = [m.observe(drawn, policy) for m, drawn in zip((memory, again), draws, strict=True)]
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a.prompt_ids, b.prompt_ids)
        assert torch.allclose(a.features, b.features, atol=1e-6)


def test_later_files_are_removed_when_a_run_goes_back(policy, turns, tmp_path):
    collected(policy, turns, tmp_path, updates=(1, 2, 3))
    again = Memory(tmp_path, 0)
    again.restore(1, 4)
    assert len(again) == 4
    assert sorted(file.name for file in tmp_path.glob("*.jsonl")) == ["000001.jsonl"]


def test_what_a_lost_machine_left_of_a_frame_is_written_again_or_told(policy, turns, tmp_path):
    collected(policy, turns, tmp_path)
    frames = {path: path.read_bytes() for path in (tmp_path / "frames").glob("*.png")}
    for path in frames:
        path.write_bytes(b"")
    for damage in (b"", b"\x89PNG\r\n\x1a\n", next(iter(frames.values()))[:-20]):
        for path in frames:
            path.write_bytes(damage)
        with pytest.raises(ValueError, match="line 1, is damaged"):
            Memory(tmp_path, 0).restore(1, 4)
    collected(policy, turns, tmp_path)
    assert frames == {path: path.read_bytes() for path in frames}


def test_a_new_start_in_a_used_folder_has_no_targets_of_the_old_one(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("gtr_turbo.collect.generate", scripted)
    (tmp_path / "imitation").mkdir()
    stale = tmp_path / "imitation" / "000001.jsonl"
    stale.write_text("{}\n")
    with own_folder(tmp_path):
        train(settings(tiny, guidance=GuidanceConfig(kind="kl")), tmp_path, Silent())
    assert not stale.exists()


def test_a_frame_is_stored_once(policy, turns, tmp_path):
    collected(policy, turns, tmp_path, updates=(1, 2))
    frames = {turn.observed.frame.tobytes() for turn in turns}
    assert len(list((tmp_path / "frames").glob("*.png"))) == len(frames)


def test_a_thousand_turns_of_one_frame_take_the_memory_of_one(policy, turns, tmp_path):
    memory = Memory(tmp_path, 0)
    turn = turns[0]
    others = [dataclasses.replace(turn, prompt=f"{turn.prompt} {i}") for i in range(1000)]
    memory.add(1, others, [splice(policy.processor, TEACHER, t.text, FIELDS) for t in others])
    drawn = memory.observe(memory.draw(1000, torch.Generator().manual_seed(0)), policy)
    assert len({seen.features.data_ptr() for seen in drawn}) == 1
    assert sum(seen.frame.nbytes for seen in drawn) == 0
    assert torch.equal(drawn[0].features, turn.observed.features)


def test_the_limit_keeps_the_newest(policy, turns, tmp_path):
    memory = collected(policy, turns, tmp_path, limit=3, updates=(1, 2))
    assert len(memory) == 3
    again = Memory(tmp_path, 3)
    again.restore(2, 3)
    assert [t.prompt for t in again.targets] == [t.prompt for t in memory.targets]


def test_the_limit_bounds_the_disk_and_what_resume_reads(policy, turns, tmp_path):
    memory = Memory(tmp_path, 3)
    for update, turn in enumerate(turns, 1):
        asked = [replace(turn, prompt=f"{turn.prompt} {i}") for i in range(2)]
        memory.add(update, asked, [splice(policy.processor, TEACHER, turn.text, FIELDS)] * 2)
    (tmp_path / "000001.jsonl").write_text("damaged, but of no use any more")
    again = Memory(tmp_path, 3)
    again.restore(4, 3)
    assert [t.prompt for t in again.targets] == [t.prompt for t in memory.targets]
    memory.prune(3)
    assert sorted(file.name for file in tmp_path.glob("*.jsonl")) == [
        f"00000{update}.jsonl" for update in (2, 3, 4)
    ], "a run that goes back to update 3 needs its two targets and one of update 2"
    back = Memory(tmp_path, 3)
    back.restore(3, 3)
    assert [t.prompt[-2:] for t in back.targets] == [" 1", " 0", " 1"]
    Memory(tmp_path, 2).prune(3)
    left = {hashlib.sha256(turns[2].observed.frame.tobytes()).hexdigest()[:16]}
    assert {path.stem for path in (tmp_path / "frames").iterdir()} == left
    Memory(tmp_path, 0).prune(3)
    assert (tmp_path / "000003.jsonl").exists(), "no limit, nothing is dropped"
    (tmp_path / "000002.jsonl").write_text("of no use\n" * 2)
    (tmp_path / "000003.jsonl").write_text("damaged\n" * 2)
    Memory(tmp_path, 2).prune(3)
    assert {path.stem for path in (tmp_path / "frames").iterdir()} == left, (
        "not known to be useless"
    )
    assert not (tmp_path / "000002.jsonl").exists()


def test_a_damaged_file_is_named(policy, turns, tmp_path):
    collected(policy, turns, tmp_path)
    (tmp_path / "000001.jsonl").write_text('{"frame": "x"}\n')
    with pytest.raises(ValueError, match=r"000001\.jsonl, line 1"):
        Memory(tmp_path, 0).restore(1, 4)


def test_a_collection_that_is_not_all_there_is_refused(policy, turns, tmp_path):
    """But for what a limit drops: of the five there were, one of three needs three."""
    collected(policy, turns, tmp_path, updates=(1, 2))
    (tmp_path / "000001.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds 4 of the 8 targets there were"):
        Memory(tmp_path, 0).restore(2, 8)
    Memory(tmp_path, 3).restore(2, 8)
    with pytest.raises(ValueError, match="holds 0 of the 3"):
        Memory(tmp_path / "elsewhere", 3).restore(2, 5)


# -- learning --------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_trained_tokens_at_temperature_one(policy, turns, tmp_path):
    memory = collected(policy, turns, tmp_path)
    generator = torch.Generator().manual_seed(0)
    parts = list(imitation_loss(policy, memory, 4, generator, microbatch=3))
    assert len(parts) == 2
    targets = memory.draw(4, torch.Generator().manual_seed(0))
    observed = memory.observe(targets, policy)
    logprobs = score(
        policy,
        inputs_of(policy, observed, [t.response_ids for t in targets]),
        temperature=1.0,
    ).logprobs
    chosen = [logprobs[i, : len(t.mask)][t.mask] for i, t in enumerate(targets)]
    assert sum(float(loss.detach()) for loss, _ in parts) == pytest.approx(
        -float(torch.cat(chosen).detach().mean()), rel=1e-5
    )
    # the action is not trained, the end token is
    mask = targets[0].mask
    assert mask[-1]
    assert not mask[targets[0].thought_tokens : -1].any()
    assert mask[: targets[0].thought_tokens].all()


def test_steps_on_the_loss_lower_it(tiny, turns, tmp_path):
    policy = make_policy(tiny)
    memory = collected(policy, turns, tmp_path)
    optimizer = torch.optim.AdamW(policy.trained().values(), lr=3e-3)
    losses = []
    for _ in range(12):
        numbers = []
        generator = torch.Generator().manual_seed(0)
        for loss, number in imitation_loss(policy, memory, 4, generator, microbatch=4):
            loss.backward()
            numbers.append(number)
        losses.append(sum(numbers))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


def test_teach_collects_what_could_be_read(policy, turns, tmp_path, monkeypatch):
    single = TEACHER.replace('"thoughts"', "'thoughts'")
    generate, _ = replay([TEACHER, "{}", TEACHER, single])
    monkeypatch.setattr("gtr_turbo.teacher.imitation.generate", generate)
    policy.load_teacher({name: torch.zeros_like(d) for name, d in policy.deltas()})
    memory = Memory(tmp_path, 0)
    guidance = GuidanceConfig(kind="sft", imitation=ImitationConfig(retries=0))
    metrics = teach(
        policy, turns, FIELDS, memory, guidance, SamplingConfig(), torch.Generator(), update=1
    )
    assert metrics["imitation/collected"] == 2.0
    assert metrics["imitation/written"] == 0.75
    assert metrics["imitation/unusable"] == 1.0
    assert [t.prompt for t in memory.targets] == [turns[i].prompt for i in (0, 2)]


def test_a_target_longer_than_a_reply_is_left_out(policy, turns, tmp_path, monkeypatch):
    long = TEACHER.replace("2*6=12", "2*6=12, so 12")
    monkeypatch.setattr("gtr_turbo.teacher.imitation.generate", replay([TEACHER, long] * 2)[0])
    policy.load_teacher({name: torch.zeros_like(d) for name, d in policy.deltas()})
    fits = [len(splice(policy.processor, TEACHER, turn.text, FIELDS)[0]) for turn in turns]
    memory, sampling = Memory(tmp_path, 0), SamplingConfig(max_new_tokens=max(fits))
    guidance = GuidanceConfig(kind="sft", imitation=ImitationConfig(retries=0))
    metrics = teach(policy, turns, FIELDS, memory, guidance, sampling, torch.Generator(), update=1)
    assert metrics["imitation/unusable"] == 2.0
    assert [t.prompt for t in memory.targets] == [turns[i].prompt for i in (0, 2)]


# -- in a run --------------------------------------------------------------------------------------


ROOM = SamplingConfig(max_new_tokens=80)  # for what `scripted` writes


def sft_settings(tiny, **groups):
    return settings(
        tiny,
        sampling=ROOM,
        guidance=GuidanceConfig(kind="sft", imitation=ImitationConfig(samples=3, retries=0)),
        **groups,
    )


def run(config, folder, monkeypatch, *, resume=False):
    monkeypatch.setattr("gtr_turbo.collect.generate", scripted)
    monkeypatch.setattr(
        "gtr_turbo.teacher.imitation.generate",
        lambda policy, observed, sampling, generator, **_: scripted(
            policy, observed, sampling, generator
        ),
    )
    view = Silent()
    with own_folder(folder):
        train(config, folder, view, resume=resume)
    return view.rows


def test_two_updates_and_two_more_are_four_with_the_collection(tiny, tmp_path, monkeypatch):
    whole = run(sft_settings(tiny, env_steps=16), tmp_path / "whole", monkeypatch)
    assert [row["imitation/collected"] for row in whole] == [4.0, 8.0, 12.0, 16.0]
    assert all(row["imitation/loss"] > 0 for row in whole)

    class StopError(Exception):
        pass

    class Stopping(Silent):
        def updated(self, row):
            super().updated(row)
            if row["update"] == 3:
                raise StopError

    monkeypatch.setattr("gtr_turbo.collect.generate", scripted)
    with pytest.raises(StopError), own_folder(tmp_path / "cut"):
        train(sft_settings(tiny, env_steps=16), tmp_path / "cut", Stopping())
    rest = run(sft_settings(tiny, env_steps=16), tmp_path / "cut", monkeypatch, resume=True)
    timeless = [
        [{k: v for k, v in row.items() if not k.startswith(("time/", "system/"))} for row in rows]
        for rows in (whole[-len(rest) :], rest)
    ]
    assert timeless[0] == timeless[1]


def test_a_bounded_collection_has_what_the_older_checkpoint_needs(tiny, tmp_path, monkeypatch):
    imitation = ImitationConfig(samples=3, retries=0, limit=5)
    bounded = settings(
        tiny,
        env_steps=20,
        sampling=ROOM,
        guidance=GuidanceConfig(kind="sft", imitation=imitation),
        save=SaveConfig(interval=1, keep=2),
    )
    whole = run(bounded, tmp_path, monkeypatch)
    files = sorted((tmp_path / "imitation").glob("*.jsonl"))
    assert [file.stem for file in files] == ["000003", "000004", "000005"], "4 turns each, 5 kept"
    kept = {file: file.read_bytes() for file in files}
    shutil.rmtree(tmp_path / "checkpoints" / "000005")
    (again,) = run(bounded, tmp_path, monkeypatch, resume=True)
    assert {file: file.read_bytes() for file in files} == kept
    assert again["imitation/loss"] == whole[-1]["imitation/loss"]


@pytest.mark.parametrize("lost", ["imitation/000001.jsonl", "imitation/frames", "imitation"])
def test_a_run_whose_collection_is_gone_does_not_go_on_without_it(
    tiny, tmp_path, monkeypatch, lost
):
    run(sft_settings(tiny, env_steps=8), tmp_path, monkeypatch)
    gone = tmp_path / lost
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    told = r"checkpoint 000002 of .* needs the thoughts collected so far.*RUN/imitation"
    with pytest.raises(CheckpointError, match=told):
        run(sft_settings(tiny, env_steps=12), tmp_path, monkeypatch, resume=True)


def test_the_disk_holds_the_collection_before_the_checkpoint(tiny, tmp_path, monkeypatch):
    """A checkpoint is renamed into its place last; what it needs must outlast a power cut as it does."""
    synced, real = [], os.fsync

    def fsync(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    run(sft_settings(tiny, env_steps=4), tmp_path, monkeypatch)
    made = {str(path) for path in (tmp_path / "imitation").rglob("*.*")}
    assert len(made) > 1
    checkpointed = next(i for i, name in enumerate(synced) if ".part/" in name)
    assert made <= set(synced[:checkpointed])


def test_static_guidance_measures_the_distance_to_the_start(tiny, tmp_path, monkeypatch):
    policy = make_policy(tiny)
    start = {n: p.detach().clone() for n, p in policy.trained().items()}
    perturb(policy)
    moved = {n: p.detach().clone() for n, p in policy.trained().items()}
    with policy.as_start():
        for name, parameter in policy.trained().items():
            assert torch.equal(parameter, start[name])
    for name, parameter in policy.trained().items():
        assert torch.equal(parameter, moved[name])
    rows = run(
        settings(tiny, env_steps=8, guidance=GuidanceConfig(kind="static")), tmp_path, monkeypatch
    )
    assert rows[0]["teacher/kl"] == 0.0  # the agent is the start
    assert rows[1]["teacher/kl"] > 0.0


@pytest.mark.parametrize(
    "wrong", [{"samples": 0}, {"temperature": 0}, {"weight": -1}, {"retries": -1}, {"limit": -1}]
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ConfigError, match=f"guidance.imitation.{next(iter(wrong))}"):
        ImitationConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"temperature": 1.0}, {"temperature_ramp": 0.9}])
def test_new_tries_are_not_colder(wrong):
    with pytest.raises(ConfigError, match="new tries must not be colder"):
        ImitationConfig(**wrong)
    ImitationConfig(temperature=1.0, temperature_max=1.0, temperature_ramp=1.0)
