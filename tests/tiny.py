"""What several tests need: policies and settings at the smallest scale, and replies by script."""

import json
import weakref

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gtr_turbo.config import (
    EnvConfig,
    EvalConfig,
    ModelConfig,
    PPOConfig,
    RolloutConfig,
    SamplingConfig,
    SaveConfig,
    TrainConfig,
)
from gtr_turbo.envs import make_env
from gtr_turbo.policy.model import Policy
from gtr_turbo.policy.scoring import score
from gtr_turbo.teaching_config import GuidanceConfig, TeacherConfig
from gtr_turbo.turns.batch import make_inputs
from gtr_turbo.turns.turn import Reply


def make_policy(path, *, temperature=0.7, seed=0, teacher_rank=None, **model):
    config = ModelConfig(path=str(path), **{"attention": "eager", **model})
    return Policy(config, temperature=temperature, seed=seed, teacher_rank=teacher_rank)


def settings(path, **groups):
    """Two environments, two turns, one optimizer step an epoch; `groups` replaces whole groups."""
    defaults = {
        "env_steps": 4,
        "threads": 1,
        "trackers": (),
        "model": ModelConfig(path=str(path), attention="eager"),
        "env": EnvConfig(
            options={"prompt": "compact"}, train_split="train", eval_split="held-out", num_envs=2
        ),
        "sampling": SamplingConfig(max_new_tokens=6),
        "rollout": RolloutConfig(turns_per_env=2),
        "ppo": PPOConfig(minibatch_turns=4, microbatch_turns=2, critic_steps=2, lr=1e-3),
        "guidance": GuidanceConfig(),
        "teacher": TeacherConfig(),
        "eval": EvalConfig(episodes=0),
        "save": SaveConfig(interval=1, keep=2, trajectories=1),
    }
    return TrainConfig(**{**defaults, **groups})


def observations(policy, count, *, style="compact"):
    """Observations of EZPoints whose prompts have different lengths."""
    env = make_env("EZPoints", prompt=style)
    shown = []
    for i in range(count):
        observation, info = env.reset(seed=i)
        for token in range(i % 3):
            observation = env.step(str(info["numbers"][token % 2]) if token % 2 == 0 else "+")[0]
        shown.append(observation)
    return policy.observe([o["image"] for o in shown], [o["prompt"] for o in shown])


def responses(policy, count, *, seed=0):
    """Random replies of different lengths, with their end token, banned tokens left out."""
    rng = np.random.default_rng(seed)
    size = len(policy.processor.tokenizer)
    allowed = np.setdiff1d(np.arange(size), policy.processor.banned_token_ids)
    rows = [rng.choice(allowed, size=int(rng.integers(2, 7))) for _ in range(count)]
    return [torch.tensor([*row, policy.processor.end_token_id]) for row in rows]


def inputs_of(policy, observed, replies):
    return make_inputs(observed, replies, policy.processor.pad_token_id)


def perturb(policy, *, scale=0.05, seed=0):
    """Move every trained weight by noise, so that nothing is near its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trained().values():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def replies(policy, observed, texts):
    """The given texts as if the policy had written them, scored with the weights in place."""
    ids = [policy.processor.reply_ids(text) for text in texts]
    scores = score(policy, inputs_of(policy, observed, ids))
    value = policy.value_head(scores.hidden)
    return [
        Reply(
            response_ids=row,
            logprobs=scores.logprobs[i, : len(row)].clone(),
            value=float(value[i]),
            hidden=scores.hidden[i].clone(),
        )
        for i, row in enumerate(ids)
    ]


def scripted(policy, observed, sampling, generator, *, greedy=False, temperature=None):
    """In place of `generate`: valid replies to EZPoints with a random action, drawn from `generator`."""
    texts = []
    for _ in observed:
        action = str(int(torch.randint(1, 11, (1,), generator=generator)))
        fields = {"cards": [2, 6], "formula": "", "thoughts": "2*6=12", "action": action}
        texts.append(json.dumps(fields))
    return replies(policy, observed, texts)


class Silent:
    """A view that shows nothing."""

    def __init__(self):
        self.rows, self.notes = [], []

    def started(self, config, run, update):
        pass

    def evaluating(self, what, done, episodes):
        pass

    def updated(self, row):
        self.rows.append(dict(row))

    def noted(self, text):
        self.notes.append(text)


class Bytes(TorchDispatchMode):
    """Inside the block, counts the bytes of tensors that operations make: `live` now, `peak`, `largest`."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        given = {
            id(t.untyped_storage())
            for t in tree_leaves((arguments, keywords))
            if torch.is_tensor(t)
        }
        for tensor in tree_leaves(made):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and storage not in self._known:
                    self._known.add(storage)
                    self.live += storage.nbytes()
                    self.largest = max(self.largest, storage.nbytes())
                    weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return made

    def _gone(self, size):
        self.live -= size
