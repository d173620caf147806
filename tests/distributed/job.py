"""What two ranks do together; test_ranks.py starts it as two processes and reads the numbers rank 0 writes.

python job.py MODEL_FOLDER RUN_OF_ONE_PROCESS OUT
"""

import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "teacher"))

from endpoints import endpoint

from gtr_turbo import checkpoint, collect, trainer
from gtr_turbo.collect import Envs
from gtr_turbo.config import EnvConfig, ModelConfig, PPOConfig, RolloutConfig, SamplingConfig
from gtr_turbo.distributed.launch import launch
from gtr_turbo.distributed.ranks import ALONE, LostContact, connect, join
from gtr_turbo.evaluate import evaluate
from gtr_turbo.learner import credit
from gtr_turbo.learning.update import make_optimizer, update
from gtr_turbo.policy.memory import USED, Microbatch
from gtr_turbo.policy.model import Policy
from gtr_turbo.policy.scoring import score
from gtr_turbo.teacher import imitation
from gtr_turbo.teacher.collection import Memory
from gtr_turbo.teacher.external import Corrector, correct
from gtr_turbo.teacher.guidance import guide
from gtr_turbo.teacher.history import History
from gtr_turbo.teacher.imitation import imitation_loss, splice
from gtr_turbo.teaching_config import (
    BudgetConfig,
    ExternalConfig,
    GuidanceConfig,
    ImitationConfig,
    TeacherConfig,
)
from gtr_turbo.turns.batch import make_batch
from tiny import Silent, replies, settings

# adam_eps: with the default, Adam turns the last digit of a gradient near 0 into a step of its full size
PPO = PPOConfig(
    adam_eps=1e-4,
    minibatch_turns=4,
    microbatch_turns=2,
    epochs=2,
    critic_steps=2,
    lr=1e-4,
    entropy_coef=0.01,
)
TIMES, ENVS = 4, 2
ENV = EnvConfig(options={"prompt": "compact"}, num_envs=ENVS)
CREDIT = {"gamma": 0.9, "lam": 0.95, "normalize": True, "eps": 0.1, "beta": 5.0, "center": True}
FORMS = {"full": {}, "lora": {"train": "lora", "lora_rank": 4, "lora_alpha": 8}}


def worded(policy, observed, sampling, generator, *, greedy=False):
    """In place of `generate`: valid replies whose thoughts have different lengths."""
    texts = []
    for _ in observed:
        action, words = (int(torch.randint(1, 11, (1,), generator=generator)) for _ in range(2))
        fields = {
            "cards": [2, 6],
            "formula": "",
            "thoughts": "2*6=12 " * words,
            "action": str(action),
        }
        texts.append(json.dumps(fields))
    return replies(policy, observed, texts)


def written(policy, observed, sampling, generator, *, temperature):
    return worded(policy, observed, sampling, generator)


def policy_of(path, form, ranks, *, shard=False):
    config = ModelConfig(path=path, attention="eager", **FORMS[form])
    policy = Policy(config, temperature=0.7, ranks=ranks, shard=shard)
    torch.manual_seed(0)
    torch.nn.init.normal_(policy.value_head.layers[-1].weight, std=0.1)
    return policy


def turns_of(path):
    """The turns of all environments, as one process plays them."""
    policy = policy_of(path, "full", ALONE)
    envs = Envs(ENV, "train", 0)
    envs.start()
    rollout = RolloutConfig(turns_per_env=TIMES)
    generator = torch.Generator().manual_seed(0)
    return collect.collect(envs, policy, SamplingConfig(), rollout, generator)


def teacher_of(policy):
    """A teacher away from the start, the same for every policy of a form."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: 0.02 * torch.randn(delta.shape, generator=generator)
        for name, delta in policy.deltas()
    }


def learn(policy, turns, ranks, credit_at, memory=None):
    """Guide, credit and update with this rank's part of `turns`; (stats, batch, optimizer).

    With a `memory` the guidance is by imitation of what is in it.
    """
    share = ENVS // ranks.world
    own = [t for t in turns if t.env_index // share == ranks.rank]
    policy.load_teacher(teacher_of(policy))
    batch = make_batch(own, share, policy.processor.pad_token_id)
    joins = None
    if memory is None:
        with policy.whole():
            batch = guide(batch, policy, GuidanceConfig(), microbatch_turns=2)
    else:

        def joins(draws, size):
            return imitation_loss(policy, memory, 3, draws, microbatch=size, idle=own[0])

    beta = CREDIT["beta"] if memory is None else 0.0
    batch = credit(batch, ranks, credit=credit_at, **{**CREDIT, "beta": beta})
    optimizer = make_optimizer(policy, PPO)
    stats = update(
        policy, optimizer, batch, PPO, seed=0, progress=0.0, progress_after=0.5,
        max_logprob_gap=5.0, imitation=joins, ranks=ranks,
    )  # fmt: skip
    return stats, batch, optimizer


def weights(policy):
    with policy.whole():
        named = {**policy.trained(), **dict(policy.value_head.named_parameters())}
        return {name: tensor.detach().clone() for name, tensor in named.items()}


def apart(ours, theirs):
    assert set(ours) == set(theirs)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def thoughts(policy, turns, ranks, folder, *, restored=False):
    """Targets of two updates: for each turn of environment 0 thoughts of other lengths, for environment 1 two.

    With `restored` as a run that goes on has them: from the files, frames to be observed again.
    """
    share = ENVS // ranks.world
    memory = Memory(folder, 0, ranks, share)
    for number in (1, 2):
        rows = [i for i, turn in enumerate(turns) if turn.env_index // share == ranks.rank]
        made = []
        for i in rows:
            said = json.loads(turns[i].text) | {"thoughts": "2+6=8 " * (i + number)}
            spliced = splice(policy.processor, json.dumps(said), turns[i].text, tuple(said))
            made.append(None if turns[i].env_index == 1 and i != 3 else spliced)
        memory.add(number, [turns[i] for i in rows], made)
    if not restored:
        return memory
    ranks.total(0)  # the files are there
    again = Memory(folder, 0, ranks, share)
    again.restore(2, len(memory))
    return again


def collections(path, turns, ranks, out):
    """The files of one process and of two ranks, and which rank takes up what of those of one."""
    policy, alone, both = policy_of(path, "full", ALONE), out / f"{ranks.rank}", out / "both"
    thoughts(policy, turns, ALONE, alone)
    thoughts(policy, turns, ranks, both)
    ranks.total(0)  # the files are there
    memory = Memory(alone, 0, ranks, ENVS // ranks.world)
    memory.restore(2, 0)
    return {
        "files": [
            {str(file.relative_to(folder)): file.read_bytes().hex() for file in folder.rglob("*.*")}
            for folder in (alone, both)
        ],
        "ranks": [target.rank for target in memory.targets],
        "names": [[t.frame for t in memory.targets if t.rank == rank] for rank in range(2)],
        "frames": ranks.gather(sorted(memory._frames)),
    }


def corrections(path, turns, ranks, out):
    """Two thirds of the valid turns corrected for one process and two ranks, then with a budget of 3 calls."""
    found = {}
    processor, envs = policy_of(path, "full", ALONE).processor, Envs(ENV, "train", 0)
    with endpoint() if ranks.first else nullcontext() as server:
        url = ranks.from_first(server and server.url)
        for name, who, calls in (("alone", ALONE, 0), ("both", ranks, 0), ("short", ranks, 3)):
            if who is ALONE and not ranks.first:
                continue
            share, folder = ENVS // who.world, out / name
            own = [t for t in turns if t.env_index // share == who.rank]
            own[0] = replace(own[0], valid=who.rank == 1)  # the first of all is not valid
            config = ExternalConfig(
                base_url=url, key_variable=None, tools=False, budget=BudgetConfig(calls=calls)
            )
            asked = Corrector(
                config, folder, envs.fields, envs.field_schemas, (), print, seed=0, ranks=who
            )
            memory, before = Memory(folder, 0, who, share), len(server.requests) if server else 0
            draws = torch.Generator().manual_seed(0)
            found[name] = correct(
                asked, processor, own, memory, draws, share=0.67, longest=200, update=1
            )
            found[name] = {k: v for k, v in found[name].items() if k != "external/latency"}
            found[f"{name} calls"] = len(server.requests) - before if server else 0
            found[f"{name} stopped"] = who.gather(asked.stopped)
            found[f"{name} targets"] = (folder / "000001.jsonl").read_text() if server else ""
    return found


def spent(path, ranks, run):
    """A run whose budget is spent in its first update, and whose checkpoint takes the first rank a second."""
    with endpoint() if ranks.first else nullcontext() as server:
        external = ExternalConfig(
            base_url=ranks.from_first(server and server.url),
            key_variable=None,
            tools=False,
            budget=BudgetConfig(calls=1),
        )
        guidance = GuidanceConfig(kind="external", external=external)
        config = settings(path, env_steps=8, guidance=guidance)
        write = checkpoint.write_atomically
        checkpoint.write_atomically = lambda *given: (time.sleep(ranks.first), write(*given))
        said = ""
        try:
            trainer.train(config, run, Silent(), ranks=ranks)
        except trainer.TrainingError as error:
            said = str(error)
        there = [folder.name for folder in checkpoint.folders(run)]
        checkpoint.write_atomically = write
        return ranks.gather([said, there])


def same_update(path, turns, ranks, out):
    """One process, two ranks, two ranks with sharded weights: the same turns."""
    found = {}
    for case, form, credit_at in (
        ("full", "full", "token"), ("lora", "lora", "advantage"), ("sft", "full", "advantage"),
    ):  # fmt: skip
        single = policy_of(path, form, ALONE)
        start = weights(single)
        kept = thoughts(single, turns, ALONE, out / f"{ranks.rank}") if case == "sft" else None
        stats, batch, _ = learn(single, turns, ALONE, credit_at, kept)
        reference = weights(single)
        for name, shard in (("ddp", False), ("fsdp", True)):
            policy = policy_of(path, form, ranks, shard=shard)
            if case == "sft":
                kept = thoughts(policy, turns, ranks, out / name, restored=shard)
            sent = ranks.sent_bytes
            ours, own, optimizer = learn(policy, turns, ranks, credit_at, kept)
            mine = ranks.rows(own.shape)
            columns = own.advantages.shape[1] if own.advantages.ndim > 1 else None
            expected = batch.advantages[mine]
            expected = expected if columns is None else expected[:, :columns]
            entries = [p.numel() for p in single.trained().values()]
            critic = [p.numel() for p in single.value_head.parameters()]
            found[f"{case}/{name}"] = {
                "apart": apart(weights(policy), reference),
                "moved": apart(start, reference),
                "credit": float((own.advantages - expected).abs().max()),
                "trained": sum(entries),
                "critic": sum(critic),
                "sent": ranks.sent_bytes - sent,
                "stats": ours,
                "reference": stats,
            }
            if shard and case != "sft":
                found[f"{form}/stored"] = stored(path, form, policy, optimizer, turns, ranks, out)
    return found


def stored(path, form, policy, optimizer, turns, ranks, out):
    """A checkpoint of sharded weights is one of whole weights: one process and two sharded ranks take it up."""
    folder, history = out / f"checkpoint-{form}", History(TeacherConfig())
    deltas = dict(policy.deltas())
    if ranks.first:
        history.add(deltas.items())
    own = weights(policy)
    state = {"update": 1, "teacher_age": 1, "start": "x"}  # with the teacher's own file
    checkpoint.save(folder, policy, optimizer, history, state, keep=1)
    kept = policy.teacher_state()
    ranks.total(0)  # the folder is there
    newest = checkpoint.folders(folder)[-1]
    merged = plain(policy_of(str(newest / "teacher"), "full", ALONE))
    found = {
        "student": apart(reloaded(path, form, newest / "student"), trained_of(own)),
        "teacher": max(
            float((merged[n] - tensor).abs().max()) for n, tensor in kept.items() if n != "norms"
        ),
        "factors": apart(
            {n: policy.change_of(n, f) for n, f in policy.factors()} if form == "lora" else deltas,
            deltas,
        ),
        "class": json.loads((newest / "teacher" / "config.json").read_text())["architectures"],
    }
    for name, who, shard in (("alone", ALONE, False), ("sharded", ranks, True)):
        other = policy_of(path, form, who, shard=shard)
        moments = make_optimizer(other, PPO)
        checkpoint.load(newest, other, moments, History(TeacherConfig()), "x")
        teacher = other.teacher_state()
        found[name] = max(
            apart(weights(other), own),
            apart(dict(other.deltas()), deltas),
            apart(teacher, kept),
            apart(moments_of(moments), moments_of(optimizer)),
        )
        inputs = make_batch(turns[:2], 2, other.processor.pad_token_id).inputs
        with torch.no_grad(), policy.as_teacher(), other.as_teacher():
            found[name] = max(
                found[name],
                float((score(policy, inputs).logprobs - score(other, inputs).logprobs).abs().max()),
            )
        found[f"{name} after"] = apart(weights(other), own)  # the swap is undone, bit for bit
    return found


def plain(policy):
    return {name: tensor.detach() for name, tensor in policy.model.named_parameters()}


def trained_of(named):
    return {name: tensor for name, tensor in named.items() if not name.startswith("layers.")}


def reloaded(path, form, student):
    """Trained weights of an agent that was loaded from its folder."""
    if form == "full":
        policy = policy_of(str(student), form, ALONE)
    else:
        config = ModelConfig(path=path, attention="eager", **FORMS[form], adapter=str(student))
        policy = Policy(config, temperature=0.7)
    return dict(policy.trained())


def moments_of(optimizer):
    return {
        name: checkpoint.full(tensor) for name, tensor in checkpoint._optimizer_tensors(optimizer)
    }


def evaluations(path, ranks):
    """Greedy replies, so that sampling plays no part; of one episode the second rank has none."""
    env = EnvConfig(options={"prompt": "compact"}, num_envs=4)
    found = {}
    for episodes, shard in ((5, False), (1, True)):
        for who in (ALONE, ranks):
            policy = policy_of(path, "full", who, shard=shard and who is ranks)
            result = evaluate(
                policy, env, SamplingConfig(max_new_tokens=6), episodes=episodes, split="held-out", seed=3,
                greedy=True,
            )  # fmt: skip
            found.setdefault(str(episodes), []).append(result.summary())
    return found


class Room:
    """A device in which a pass takes 10 and 9 a turn; `room` is left beside Adam's moments."""

    def __init__(self, room):
        self._room, self._peaks = room, iter([19, 19, 46])

    def start(self):
        pass

    def peak(self):
        return next(self._peaks)

    def free(self):
        return self._room / USED


def sizes(path, turns, ranks):
    """The second rank has less memory: for 10 turns by measure, and in the end for one."""
    policy = policy_of(path, "lora", ALONE)
    moments = 2 * sum(parameter.nbytes for parameter in policy.trained().values())
    auto = replace(PPO, microbatch_turns="auto", minibatch_turns=12)
    meter = Room(moments + (100 if ranks.rank else 1000))
    micro = Microbatch(auto, print, meter, ranks=ranks)
    micro.measure(policy, [turn.observed for turn in turns], 5)
    found = {"measured": micro.turns, "tried": []}

    def work(turns):
        found["tried"].append(turns)
        if ranks.rank and turns > 1:
            raise torch.OutOfMemoryError("full")
        return turns

    found["done"] = micro.attempt(work)
    return found


def sft_settings(path, **groups):
    """Three collected thoughts a step, one a forward pass."""
    own = ImitationConfig(samples=3, retries=0)
    ppo = PPOConfig(minibatch_turns=4, microbatch_turns=1, critic_steps=2, lr=1e-3)
    return settings(
        path,
        sampling=SamplingConfig(max_new_tokens=80),  # room for what `scripted` writes
        guidance=GuidanceConfig(kind="sft", imitation=own),
        ppo=ppo,
        **groups,
    )


def resumed(path, run, ranks):
    """Two ranks go on with the run of one process."""
    config = sft_settings(path, env_steps=8)
    before = checkpoint.read_state(checkpoint.folders(run)[-1])
    trainer.train(config, run, Silent(), resume=True, ranks=ranks)
    ranks.total(0)
    after = checkpoint.read_state(checkpoint.folders(run)[-1])
    return {"before": before["envs"], "after": after["envs"]}


def odd_gradients(ranks):
    """A parameter with a gradient on one rank, one with none anywhere, one of another type."""
    one, none = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    half = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    half.grad = torch.full((2,), 1.0 + ranks.rank, dtype=torch.bfloat16)
    if ranks.rank == 1:
        one.grad = torch.tensor([1.0, 2.0, 3.0])
    ranks.sum_gradients([one, none, half])
    return {"one": one.grad.tolist(), "none": none.grad is None, "half": half.grad.tolist()}


def main():
    path, run, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    collect.generate = worded
    imitation.generate = written
    place = launch()
    connect(place)
    with join(place, "cpu", 600.0) as ranks:
        found = {"gradients": odd_gradients(ranks)}
        turns = turns_of(path)
        found["sizes"] = sizes(path, turns, ranks)
        found["update"] = same_update(path, turns, ranks, out)
        found["corrections"] = corrections(path, turns, ranks, out / "corrected")
        found["spent"] = spent(path, ranks, out / "spent")
        found["collections"] = collections(path, turns, ranks, out)
        found["resumed"] = resumed(path, run, ranks)
        collect.generate = GENERATE
        found["evaluations"] = evaluations(path, ranks)
        found["disagreement"] = ""
        try:
            ranks.agree("numbers", ranks.rank)
        except ValueError as error:
            found["disagreement"] = str(error)
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        try:
            ranks.total(1.0)
        except LostContact as error:
            found["lost"] = {"said": str(error), "seconds": time.monotonic() - began}
        (out / "found.json").write_text(json.dumps(found))
        os._exit(0)  # the other rank is gone


GENERATE = collect.generate

if __name__ == "__main__":
    main()
