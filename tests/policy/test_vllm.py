import base64
import io
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from vllm_fake import GenerateError, installed, serving

from gtr_turbo.checkpoint import own_folder
from gtr_turbo.checks import ConfigError
from gtr_turbo.config import ModelConfig, RolloutConfig, SamplingConfig, VllmConfig
from gtr_turbo.policy.scoring import score
from gtr_turbo.policy.vllm import VllmEngine
from gtr_turbo.policy.vllm_http import EngineError
from gtr_turbo.policy.vllm_inprocess import WATCH
from gtr_turbo.policy.vllm_probe import Probe, check_moved
from gtr_turbo.policy.vllm_server import TETHER, command
from gtr_turbo.trainer import train
from tiny import Silent, inputs_of, make_policy, observations, perturb, settings

LORA = {"train": "lora", "lora_rank": 4, "lora_alpha": 8}
SAMPLING = SamplingConfig(max_new_tokens=6)


def fresh(folder):
    made = make_policy(folder, **LORA)
    perturb(made, scale=0.1)
    return made


@pytest.fixture(scope="module")
def behind(tiny25):
    """The policy that the fake servers answer with."""
    return fresh(tiny25)


@pytest.fixture
def policy(tiny25):
    return fresh(tiny25)


def config_of(folder, url, **vllm):
    model = ModelConfig(path=str(folder), attention="eager", **LORA)
    vllm = VllmConfig(
        **{"base_url": url, "backoff_s": 0.01, "timeout_s": 5.0, "retries": 2, **vllm}
    )
    rollout = RolloutConfig(turns_per_env=2, engine="vllm", vllm=vllm)
    return settings(folder, model=model, rollout=rollout)


def engine_for(policy, url, folder, **vllm):
    notes = []
    made = VllmEngine(
        policy, config_of(policy.config.path, url, **vllm), folder / "vllm", notes.append
    )
    made.notes = notes
    return made


def write(engine, policy, count=2, **options):
    generator = torch.Generator().manual_seed(1)
    return engine.generate(observations(policy, count), SAMPLING, generator, **options)


def changed(answer, **fields):
    """The answer with fields of its choice replaced."""
    return {**answer, "choices": [{**answer["choices"][0], **fields}]}


# -- replies ---------------------------------------------------------------------------------


def test_a_request_holds_the_prompt_as_ids_the_picture_and_every_setting(policy, behind, tmp_path):
    (seen,) = observations(policy, 1)
    sampling = SamplingConfig(max_new_tokens=6, top_k=5, repetition_penalty=1.2)
    with serving(behind) as server:
        engine = engine_for(policy, server.url, tmp_path)
        engine.refresh()
        engine.generate([seen], sampling, torch.Generator().manual_seed(1))
        ((path, body),) = [r for r in server.requests if "generate" in r[0]]
    assert path == "/inference/v1/generate"
    assert body["model"] in server.loaded
    image = policy.processor.image_token_id
    assert body["token_ids"].count(image) == 1
    assert [t for t in body["token_ids"] if t != image] == [
        t for t in seen.prompt_ids.tolist() if t != image
    ]
    sent = Image.open(io.BytesIO(base64.b64decode(body["content_parts"][0]["url"].split(",")[1])))
    assert np.array_equal(np.asarray(sent), policy.processor.shrink(seen.frame))
    seed = body["sampling_params"].pop("seed")
    assert type(seed) is int
    assert body["sampling_params"] == {
        "temperature": 0.7, "top_k": 5, "repetition_penalty": 1.2, "max_tokens": 6, "top_p": 1.0,
        "min_p": 0.0, "logprobs": 0, "detokenize": False, "ignore_eos": True,
        "stop_token_ids": [policy.processor.end_token_id],
        "logit_bias": {str(t): -100.0 for t in policy.processor.banned_token_ids},
    }  # fmt: skip


def test_replies_carry_the_trainers_log_probs_values_and_hidden_states(policy, behind, tmp_path):
    torch.nn.init.normal_(policy.value_head.layers[-1].weight)
    observed = observations(policy, 3)
    with serving(behind) as server:
        engine = engine_for(policy, server.url, tmp_path)
        engine.refresh()
        replies = write(engine, policy, 3)
    ids = [reply.response_ids for reply in replies]
    with torch.no_grad():
        scores = score(policy, inputs_of(policy, observed, ids))
        values = policy.value_head(scores.hidden)
    for i, reply in enumerate(replies):
        assert torch.allclose(reply.logprobs, scores.logprobs[i, : len(ids[i])], atol=1e-4)
        assert torch.allclose(reply.hidden, scores.hidden[i], atol=1e-4)
        assert reply.value == pytest.approx(float(values[i]), abs=1e-3)
    row = engine.metrics()
    assert row["engine/logprob_gap"] < 1e-4
    assert row["engine/restarts"] == 0


def test_the_generator_seeds_the_replies(policy, behind, tmp_path):
    with serving(behind) as server:
        engine = engine_for(policy, server.url, tmp_path)
        engine.refresh()
        first, again = write(engine, policy), write(engine, policy)
        greedy = write(engine, policy, greedy=True)
        bodies = [body["sampling_params"] for path, body in server.requests if "generate" in path]
    seeds = torch.randint(2**31, (2,), generator=torch.Generator().manual_seed(1)).tolist()
    assert {body["seed"] for body in bodies} == set(seeds)
    assert [body["temperature"] for body in bodies] == [0.7] * 4 + [0.0] * 2
    for one, two in zip(first, again, strict=True):
        assert one.response_ids.tolist() == two.response_ids.tolist()
    assert first[0].response_ids.tolist() != greedy[0].response_ids.tolist()


# -- faults ----------------------------------------------------------------------------------

FAULTS = {
    "html": b"<html>Bad gateway</html>",
    "garbage": b'{"choices": [',
    "a list": b"[1]",
    "deep": b"[" * 100_000,
    "dropped": "drop",
    "500": (500, {"error": {"message": "boom"}}),
    "429": (429, b""),
    "no choices": lambda a: {**a, "choices": []},
    "no prompt": lambda a: {**a, "prompt_token_ids": None},
    "text ids": lambda a: changed(a, token_ids=["5"]),
    "no log-probs": lambda a: changed(a, logprobs=None),
    "log-probs of others": lambda a: changed(a, token_ids=[7] * len(a["choices"][0]["token_ids"])),
    "not finite": lambda a: changed(
        a, token_ids=[7], logprobs={"content": [{"token_id": 7, "logprob": float("nan")}]}
    ),
    "aborted": lambda a: changed(a, finish_reason="abort"),
    "too long": lambda a: changed(
        a, token_ids=[7] * 7, finish_reason="length",
        logprobs={"content": [{"token_id": 7, "logprob": -1.0}] * 7},
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_that_is_none_is_asked_for_again(fault, policy, behind, tmp_path):
    with serving(behind, FAULTS[fault]) as server:
        engine = engine_for(policy, server.url, tmp_path)
        engine.refresh()
        replies = write(engine, policy)
        asked = sum("generate" in path for path, _ in server.requests)
    assert len(replies) == 2
    assert asked == 3  # two replies, and the one that failed
    assert len(engine.notes) == 1


@pytest.mark.parametrize("fault", ["slow", "drip"])
def test_a_request_has_a_deadline_however_the_bytes_come(fault, policy, behind, tmp_path):
    with serving(behind, fault) as server:
        engine = engine_for(policy, server.url, tmp_path, timeout_s=1.0)
        engine.refresh()
        write(engine, policy, 1)
    assert engine.notes == ["vLLM: no answer within 1 s; trying again"]


def test_a_fault_that_stays_stops_the_run(policy, behind, tmp_path):
    with serving(behind, *[FAULTS["500"]] * 3) as server:
        engine = engine_for(policy, server.url, tmp_path)
        engine.refresh()
        with pytest.raises(EngineError, match=r"after 3 tries: HTTP 500.*boom.*--resume"):
            write(engine, policy, 1)
        assert len(engine.notes) == 2


def test_nobody_there(policy, tmp_path):
    engine = engine_for(policy, "http://127.0.0.1:9", tmp_path, retries=1)
    with pytest.raises(EngineError, match=r"http://127.0.0.1:9 after 2 tries: no answer.*refused"):
        engine.refresh()


REFUSALS = {
    "400": ((400, {"error": {"message": "prompt too long"}}), "HTTP 400.*prompt too long"),
    "no route": ((404, {"detail": "Not Found"}), "/inference/v1/generate: start it with --enable-scale-out"),
    "401": ((401, b""), "VLLM_API_KEY"),
    "other prompt": (
        lambda a: {**a, "prompt_token_ids": [*a["prompt_token_ids"][:9], 7]},
        r"prompt of 10 tokens, the trainer one of \d+; they part at token 9",
    ),
    "placeholder": (
        lambda a: changed(
            a, token_ids=[5] * 6, finish_reason="length",
            logprobs={"content": [{"token_id": 5, "logprob": -1.0}] * 6},
        ),
        "placeholder",
    ),
    "context full": (
        lambda a: changed(
            a, token_ids=[7], finish_reason="length", logprobs={"content": [{"token_id": 7, "logprob": -1.0}]}
        ),
        "after 1 of 6 tokens.*max_model_len",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_no_retry_can_mend_stops_at_once(case, policy, behind, tmp_path):
    assert policy.processor.image_token_id == 5
    fault, message = REFUSALS[case]
    with serving(behind, fault) as server:
        engine = engine_for(policy, server.url, tmp_path)
        engine.refresh()
        with pytest.raises(EngineError, match=message):
            write(engine, policy, 1)
        assert sum("generate" in path for path, _ in server.requests) == 1


def test_the_key_is_sent_and_never_shown(policy, behind, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "sk-secret-words")
    with serving(behind, (400, {"error": "bad key sk-secret-words"})) as server:
        engine = engine_for(policy, server.url, tmp_path)
        engine.refresh()
        with pytest.raises(EngineError) as caught:
            write(engine, policy, 1)
    assert set(server.keys) == {"Bearer sk-secret-words"}
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-secret\nwords", "sk-secret\u2013words"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_repeated(
    policy, tmp_path, monkeypatch, key
):
    monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(ConfigError, match="VLLM_API_KEY must hold a key of printable") as caught:
        engine_for(policy, "http://127.0.0.1:9", tmp_path)
    assert "secret" not in str(caught.value)


# -- weights ---------------------------------------------------------------------------------


def test_a_changed_adapter_is_sent_under_a_new_name_and_the_old_one_goes(policy, behind, tmp_path):
    with serving(behind) as server:
        engine = engine_for(policy, server.url, tmp_path)
        engine.refresh()
        write(engine, policy)
        (first,) = server.loaded
        count = len(server.requests)
        engine.refresh()  # nothing changed, nothing is sent
        assert len(server.requests) == count
        perturb(policy, scale=0.05, seed=1)
        engine.metrics()
        engine.refresh()
        write(engine, policy)
        (second,) = server.loaded
    assert first != second
    assert os.listdir(tmp_path / "vllm") == [second]
    row = engine.metrics()
    assert row["engine/logprob_gap"] < 1e-4
    assert row["engine/probe_change_wanted"] > 0.01
    assert row["engine/probe_change"] == pytest.approx(row["engine/probe_change_wanted"], rel=1e-2)
    engine.close()
    assert os.listdir(tmp_path / "vllm") == []


def test_adapters_that_a_killed_run_left_are_removed(policy, behind, tmp_path):
    for left in ("student-0123456789abcdef", "teacher-0123456789abcdef.part"):
        (tmp_path / "vllm" / left).mkdir(parents=True)
        (tmp_path / "vllm" / left / "adapter_model.safetensors").write_bytes(b"x")
    (tmp_path / "vllm" / "server.log").write_text("kept")
    with serving(behind) as server:
        engine = engine_for(policy, server.url, tmp_path)
        engine.refresh()
        (name,) = server.loaded
        assert sorted(os.listdir(tmp_path / "vllm")) == ["server.log", name]
        engine.close()
    assert os.listdir(tmp_path / "vllm") == ["server.log"]


def test_a_server_that_takes_an_adapter_and_ignores_it_is_found_out(policy, behind, tmp_path):
    with serving(behind) as server:
        engine = engine_for(policy, server.url, tmp_path)
        engine.refresh()
        write(engine, policy)
        server.deaf = True
        perturb(policy, scale=0.05, seed=1)
        with pytest.raises(EngineError, match=r"still writes with the old weights.*vLLM's by 0\b"):
            engine.refresh()
        assert len(os.listdir(tmp_path / "vllm")) == 2
        engine.close()
    assert os.listdir(tmp_path / "vllm") == []


def test_whether_the_server_moved_by_hand():
    probe = Probe(None, None, torch.tensor([-1.0, -2.0]), torch.tensor([-1.1, -2.1]))  # gap 0.1
    same, moved = torch.tensor([-1.1, -2.1]), torch.tensor([-2.1, -3.1])
    assert check_moved(probe, torch.tensor([-2.0, -3.0]), moved) is True
    assert check_moved(probe, torch.tensor([-2.0, -3.0]), same) is False
    assert check_moved(probe, torch.tensor([-1.3, -2.3]), same) is None  # 0.3 is within 4 * 0.1


def test_a_server_with_other_weights_stops_the_run(policy, behind, tmp_path):
    with serving(behind) as server:
        engine = engine_for(policy, server.url, tmp_path)
        engine.refresh()
        engine._bound = 0.01
        server.deaf = True
        perturb(behind, scale=0.2, seed=5)
        with pytest.raises(EngineError, match=r"max_logprob_gap=0\.01"):
            write(engine, policy)


def test_a_server_that_forgot_the_adapter_gets_it_again(policy, behind, tmp_path):
    with serving(behind) as server:
        engine = engine_for(policy, server.url, tmp_path)
        engine.refresh()
        server.loaded.clear()
        assert len(write(engine, policy)) == 2
        assert [path for path, _ in server.requests].count("/v1/load_lora_adapter") == 2


def test_a_server_elsewhere_that_is_started_again_is_waited_for(policy, behind, tmp_path):
    """It takes minutes to load its model, and then knows no adapter."""
    with serving(behind) as server:
        engine = engine_for(policy, server.url, tmp_path, retries=1, backoff_s=0.02)
        engine.refresh()

        def back():
            server.loaded.clear()
            server.down = False

        server.down = True
        timer = threading.Timer(0.5, back)
        timer.start()
        assert len(write(engine, policy)) == 2
        timer.join()
        server.down = True
        engine._link._config = replace(engine._link._config, startup_s=0.1)
        with pytest.raises(EngineError, match="after 2 tries"):
            write(engine, policy)
    assert next(note for note in engine.notes if "to come back" in note).startswith(
        "vLLM: waiting up to 900 s for http://127.0.0.1"
    )


def test_an_adapter_that_the_server_has_is_taken_as_it_is(policy, behind, tmp_path):
    """The name tells the content: of a run that crashed, or a request whose answer was lost."""
    with serving(behind) as server:
        engine_for(policy, server.url, tmp_path).refresh()
        again = engine_for(policy, server.url, tmp_path)
        again.refresh()
        assert len(write(again, policy)) == 2
        assert len(server.loaded) == 1


# -- a server of our own ---------------------------------------------------------------------


def own(policy, folder, **options):
    """An engine whose server is a process without a model, and the file that rules its deaths."""
    state = folder / "state.json"
    state.write_text(
        json.dumps(
            {"deaths": 0, "image": policy.processor.image_token_id, **options.pop("state", {})}
        )
    )
    python = folder / "python"
    fake = Path(__file__).parent / "vllm_fake.py"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{fake}" "{state}" "$@"\n')
    python.chmod(0o755)
    engine = engine_for(policy, None, folder, python=str(python), **options)
    engine._bound = 1e9  # it makes its log-probs up
    return engine


def gone(engine):
    return engine._link.server._process is None


def test_a_dead_server_is_started_again_and_the_turn_repeated(policy, tmp_path):
    engine = own(policy, tmp_path, state={"deaths": 2}, restarts=2)
    engine.refresh()
    process = engine._link.server._process
    replies = write(engine, policy, 1)
    assert replies[0].response_ids.tolist() == [policy.processor.end_token_id]
    assert engine.metrics()["engine/restarts"] == 2
    assert process.poll() is not None
    last = engine._link.server._process
    engine.close()
    assert last.poll() is not None
    assert gone(engine)


def test_a_server_that_dies_too_often_stops_the_run(policy, tmp_path):
    engine = own(policy, tmp_path, state={"deaths": 9}, restarts=1)
    engine.refresh()
    with pytest.raises(EngineError, match=r"died 2 times .rollout\.vllm\.restarts=1"):
        write(engine, policy, 1)
    engine.close()


def test_a_new_start_that_fails_is_repeated_as_often_as_is_left(policy, tmp_path):
    """What died may hold the GPU's memory for a while."""
    engine = own(policy, tmp_path, state={"deaths": 1, "broken": [2, 3]}, restarts=3)
    engine.refresh()
    assert len(write(engine, policy, 1)) == 1
    assert engine.metrics()["engine/restarts"] == 3
    assert sum("ValueError: no such model" in note for note in engine.notes) == 2
    engine.close()


def test_a_server_that_does_not_start_is_quoted(policy, tmp_path):
    engine = own(policy, tmp_path, state={"broken": [1]})
    with pytest.raises(
        EngineError, match=r"ended at its start: ValueError: no such model .*server.log"
    ):
        engine.refresh()
    assert gone(engine)


def test_a_server_that_is_never_ready_is_stopped(policy, tmp_path):
    engine = own(policy, tmp_path, startup_s=0.5)
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(EngineError, match=r"not ready within rollout\.vllm\.startup_s=0.5 s"):
        engine.refresh()
    assert gone(engine)


def test_a_server_ends_with_the_process_that_started_it():
    words = [sys.executable, "-c", TETHER, "/bin/sleep", "60"]
    code = (
        "import subprocess, sys, time\n"
        f"print(subprocess.Popen({words!r}, start_new_session=True).pid, flush=True)\ntime.sleep(60)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    server = int(starter.stdout.readline())
    name = Path(f"/proc/{server}/comm")
    while name.read_text() != "sleep\n":  # tied before it becomes the server
        time.sleep(0.01)
    starter.kill()
    starter.communicate()
    for _ in range(500):
        if not name.exists() or "State:\tZ" in name.with_name("status").read_text():
            return
        time.sleep(0.01)
    os.kill(server, 9)
    pytest.fail("it lives on")


def test_the_command_serves_adapters_of_this_rank_in_this_type(tiny25):
    config = VllmConfig(python="other/python", arguments=("--enforce-eager",), max_model_len=512)
    words = command(ModelConfig(path=str(tiny25), dtype="bfloat16", **LORA), config, 48, 8123)
    options = dict(itertools.pairwise(words))
    assert words[0] == "other/python"
    assert options["--max-lora-rank"] == "64"
    assert options["--dtype"] == "bfloat16"
    assert options["--model"] == str(tiny25)
    assert options["--port"] == "8123"
    assert words[-1] == "--enforce-eager"
    with pytest.raises(ConfigError, match="rank 512, got 600"):
        command(ModelConfig(path=str(tiny25), **LORA), config, 600, 1)


@pytest.mark.parametrize("mode", ["server", "inprocess"])
def test_without_vllm_the_error_says_what_to_do(mode, policy, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"gtr-turbo\[vllm\].*mode at server.*rollout.vllm.python"
    ):
        engine_for(policy, None, tmp_path, mode=mode)


def test_a_server_of_our_own_sleeps_between_collections(policy, tmp_path):
    engine = own(policy, tmp_path, sleep=True)
    state = tmp_path / "state.json"
    engine.refresh()
    write(engine, policy, 1)
    engine.rest()
    assert json.loads(state.read_text())["asleep"] is True
    engine.refresh()
    assert json.loads(state.read_text())["asleep"] is False
    assert len(write(engine, policy, 1)) == 1
    engine.close()
    assert engine.notes == []


# -- an engine in this process ---------------------------------------------------------------


def inside(policy, folder, **options):
    return engine_for(policy, None, folder, mode="inprocess", **options)


def test_an_engine_in_process_answers_as_a_server_does(policy, behind, tmp_path, monkeypatch):
    with serving(behind) as server:
        elsewhere = engine_for(policy, server.url, tmp_path / "http")
        elsewhere.refresh()
        wanted = write(elsewhere, policy)
    with installed(monkeypatch, behind) as vllm:
        engine = inside(policy, tmp_path)
        engine.refresh()
        replies = write(engine, policy)
        (made,) = vllm.engines
        assert list(made.adapters) == [1]
        perturb(policy, scale=0.05, seed=1)
        engine.refresh()
        write(engine, policy)
        assert len(made.adapters) == 1
        engine.close()
    for one, two in zip(replies, wanted, strict=True):
        assert one.response_ids.tolist() == two.response_ids.tolist()
    row = engine.metrics()
    assert row["engine/logprob_gap"] < 1e-4
    assert row["engine/probe_change"] == pytest.approx(row["engine/probe_change_wanted"], rel=1e-2)
    assert vllm.calls[-1] == "shutdown"
    assert vllm.words[0][vllm.words[0].index("--max-lora-rank") + 1] == "8"
    assert not any(thread.name == "vllm" for thread in threading.enumerate())


def test_a_dead_engine_is_made_anew_and_the_turn_repeated(policy, behind, tmp_path, monkeypatch):
    with installed(monkeypatch, behind, "ok", "dead", "dead") as vllm:
        engine = inside(policy, tmp_path, restarts=2)
        engine.refresh()
        assert len(write(engine, policy)) == 2
        assert engine.metrics()["engine/restarts"] == 2
        assert vllm.calls.count("shutdown") == 2
        assert len(vllm.engines) == 3
        engine.close()


def test_an_engine_that_dies_too_often_stops_the_run(policy, behind, tmp_path, monkeypatch):
    with installed(monkeypatch, behind, "dead", "dead") as vllm:
        engine = inside(policy, tmp_path, restarts=1)
        engine.refresh()
        with pytest.raises(
            EngineError, match=r"died 2 times .rollout\.vllm\.restarts=1.*engine.log"
        ):
            write(engine, policy, 1)
        assert len(vllm.engines) == 2
        engine.close()


def test_an_engine_that_forgot_the_adapter_gets_it_again(policy, behind, tmp_path, monkeypatch):
    with installed(monkeypatch, behind) as vllm:
        engine = inside(policy, tmp_path)
        engine.refresh()
        engine._link.client._adapters.clear()
        assert len(write(engine, policy, 1)) == 1
        assert vllm.calls.count("add_lora") == 2
        engine.close()


FAILURES = {
    "hang": ("hang", "no answer within 2 s"),
    "failed": (GenerateError("out of pages"), "out of pages"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_request_that_failed_is_repeated(case, policy, behind, tmp_path, monkeypatch):
    fault, said = FAILURES[case]
    with installed(monkeypatch, behind, fault) as vllm:
        engine = inside(policy, tmp_path)
        engine.refresh()
        engine._link.client._timeout_s = 2.0
        assert len(write(engine, policy, 1)) == 1
        assert len(vllm.engines) == 1
        engine.close()
    (note,) = engine.notes
    assert said in note


def test_a_request_that_vllm_refuses_stops_the_run(policy, behind, tmp_path, monkeypatch):
    with installed(monkeypatch, behind, ValueError("prompt too long")) as vllm:
        engine = inside(policy, tmp_path)
        engine.refresh()
        with pytest.raises(EngineError, match=r"vLLM refuses: ValueError: prompt too long"):
            write(engine, policy, 1)
        assert vllm.calls.count("generate") == 1
        engine.close()


def test_an_engine_that_cannot_be_made_is_quoted(policy, behind, tmp_path, monkeypatch):
    with installed(monkeypatch, behind, broken=ValueError("Sleep mode is not supported")):
        engine = inside(policy, tmp_path, sleep=True)
        with pytest.raises(EngineError, match=r"at its start: ValueError: Sleep mode .*engine.log"):
            engine.refresh()
        engine = inside(policy, tmp_path, arguments=("--chat-template", "1"))
        with pytest.raises(ConfigError, match=r"refuses an argument.*'--chat-template 1'"):
            engine.refresh()


def test_an_engine_ends_with_the_process_that_made_it():
    child = subprocess.Popen(["/bin/sleep", "60"])
    watch = [sys.executable, "-c", WATCH, str(child.pid)]
    keeper = subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True)
    assert child.poll() is None
    keeper.stdin.close()  # as when the process that holds it is killed
    assert child.wait(20) == -9
    assert keeper.wait(20) == 0


def test_in_a_run_the_engine_sleeps_whenever_no_replies_are_written(
    tiny25, behind, tmp_path, monkeypatch
):
    config = config_of(tiny25, None, mode="inprocess", sleep=True)
    config = settings(tiny25, env_steps=8, model=config.model, rollout=config.rollout)
    view = Silent()
    with installed(monkeypatch, behind) as vllm, own_folder(tmp_path):
        train(config, tmp_path, view)  # a call while it sleeps would stop it
        assert len(vllm.engines) == 1
    told = [call for call in vllm.calls if call in ("sleep", "wake_up", "add_lora", "shutdown")]
    assert told == ["add_lora", "sleep", "wake_up", "add_lora", "sleep", "shutdown"]
    assert "--enable-sleep-mode" in vllm.words[0]
    assert all(row["engine/logprob_gap"] < 1e-4 for row in view.rows)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "inprocess", "base_url": "http://h:1"}, "mode='inprocess'.*base_url"),
        ({"mode": "inprocess", "python": "other/python"}, "mode='inprocess'.*python"),
        ({"sleep": True, "base_url": "http://h:1"}, "sleep=true.*base_url"),
        ({"arguments": ("--port", "9000")}, "arguments: --port is the run's own"),
        ({"arguments": ("--enforce-eager", "--ssl_keyfile=k")}, "--ssl_keyfile is the run's own"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        VllmConfig(**given)


# -- a run -----------------------------------------------------------------------------------


def test_a_run_with_the_engine_logs_its_group(tiny25, behind, tmp_path):
    view = Silent()
    with serving(behind) as server, own_folder(tmp_path):
        config = config_of(tiny25, server.url)
        config = settings(tiny25, env_steps=8, model=config.model, rollout=config.rollout)
        train(config, tmp_path, view)
    first, second = view.rows
    assert {name for name in second if name.startswith("engine/")} == {
        "engine/logprob_gap", "engine/restarts", "engine/sync_seconds",
        "engine/probe_change", "engine/probe_change_wanted",
    }  # fmt: skip
    assert first["engine/logprob_gap"] < 1e-4
    assert second["engine/logprob_gap"] < 1e-4
    assert second["engine/probe_change"] == pytest.approx(
        second["engine/probe_change_wanted"], rel=0.1
    )
    assert first["ppo/first_log_ratio"] < 1e-3
    loads = [
        body["lora_name"] for path, body in server.requests if path.endswith("/load_lora_adapter")
    ]
    assert len(set(loads)) == len(loads) == 2  # an adapter an update
    assert not server.loaded


@pytest.mark.parametrize(
    ("model", "message"),
    [({"train": "full"}, "got 'full'"), ({"train": "lora", "vision": "trained"}, "and 'trained'")],
)
def test_what_cannot_be_sent_is_refused(tiny25, model, message):
    with pytest.raises(ConfigError, match=message):
        settings(
            tiny25,
            model=ModelConfig(path=str(tiny25), **model),
            rollout=RolloutConfig(turns_per_env=2, engine="vllm"),
        )


@pytest.mark.parametrize(
    "url", ["localhost:8000", "http://h:8000/v1", "http://u:p@h", "http://h/?key=1", "ftp://h"]
)
def test_an_address_is_that_of_the_server(url):
    with pytest.raises(ConfigError, match=r"rollout\.vllm\.base_url"):
        VllmConfig(base_url=url)
