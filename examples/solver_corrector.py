"""A corrector of thoughts without a model and without money: an OpenAI-compatible server around the exact solver.

It reads the cards from the picture it is sent, which must be one of our own frames, and the formula from the
prompt; the frame drawn from what it read must be the picture, pixel for pixel. If the request offers the tool
`solve`, it calls that, as GTR's corrector does; otherwise it solves by itself. `docs/external.md` uses it.

    python examples/solver_corrector.py --port 8024
"""

import argparse
import base64
import io
import json
import re
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

from gtr_turbo.envs import make_env
from gtr_turbo.envs.cards.drawing import (
    CARD_HEIGHT,
    CARD_WIDTH,
    COLUMN,
    RANKS,
    SIZE,
    Card,
    card_face,
)

ROW = 40
MODEL = "exact-solver"
COMPACT = re.compile(r"(points24|ezpoints) (token|reduction|formula)(?: (.*?)(?: \(.*\))?)?")
FACES = {
    np.asarray(card_face(Card(rank, suit))).tobytes(): Card(rank, suit)
    for rank in range(13)
    for suit in range(4)
}


class RequestError(ValueError):
    """A request that cannot be answered: HTTP 400."""


BAD_REQUESTS = (
    LookupError,
    OSError,
    RecursionError,
    StopIteration,
    TypeError,
    ValueError,
    Image.DecompressionBombError,
)


def read_cards(image):
    """The cards of a frame, uint8 (300, 300, 3), from left to right; each must be drawn exactly as ours."""
    if image.shape != (SIZE, SIZE, 3):
        raise RequestError(f"the picture must be {SIZE}x{SIZE} RGB, got {image.shape}")
    cards = []
    for left in range(3, SIZE, COLUMN):
        face = image[ROW : ROW + CARD_HEIGHT, left : left + CARD_WIDTH]
        card = FACES.get(np.ascontiguousarray(face).tobytes())
        if card is not None:
            cards.append(card)
    return cards


def read_prompt(text):
    """(environment, style, granularity, formula) of a prompt of EZPoints or Points24."""
    if found := COMPACT.fullmatch(text):
        name = {"points24": "Points24", "ezpoints": "EZPoints"}[found[1]]
        return name, "compact", found[2], (found[3] or "").strip()
    name = "Points24" if "expert 24 points card" in text else "EZPoints"
    if found := re.search(r"the current steps: '(.*?)'", text):
        return name, "full", "reduction", found[1]
    if found := re.search(r"the current formula: '(.*?)'", text):
        return name, "full", "token", found[1]
    if name == "Points24" and "output a formula" in text:
        return name, "full", "formula", ""
    raise RequestError("the agent's prompt is none of EZPoints or Points24")


def read_question(messages):
    """(prompt, thought, image) of what `guidance.kind: external` sends."""
    parts = messages[1]["content"]
    text = next(part["text"] for part in parts if part["type"] == "text")
    url = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
    if not (isinstance(text, str) and isinstance(url, str)):
        raise RequestError("the text and the address of the picture must be strings")
    head, thought = text.rsplit("\n\nThe agent's thought:\n", 1)
    data = base64.b64decode(url.removeprefix("data:image/png;base64,"), validate=True)
    image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return head.removeprefix("The agent's prompt:\n"), json.loads(thought), image


def situation(prompt, image):
    """An environment in the state that the picture and the prompt show, and the formula as text."""
    name, style, granularity, formula = read_prompt(prompt)
    cards = read_cards(image)
    env = make_env(name, prompt=style, granularity=granularity).unwrapped
    if len(cards) != env.count:
        raise RequestError(f"{env.count} cards of ours are due in the picture, found {len(cards)}")
    observation, _ = env.reset(options={"cards": cards})
    if granularity == "token":
        actions = re.findall(r"10|\S", formula)  # numbers in a row, 10 and 3, read 103
    else:
        actions = [step.rpartition("=")[0] for step in formula.split(", ") if step]
    for action in actions:
        observation = env.step(action)[0]
    if observation["prompt"] != prompt or not np.array_equal(observation["image"], image):
        raise RequestError("the picture is not the frame that its cards and the prompt give")
    return env


def correction(env, thought, solved):
    """What is answered: a plan that is right is given back, another is replaced.

    Where nothing reaches the goal any more, there is no better plan than the agent's: only what it sees is mended.
    """
    facts = env.judge({**thought, "action": "="})
    plan = solved.get("plan")
    right = facts["perception"] and (facts.get("plan", False) or plan is None)
    wrong = "Its plan" if facts["perception"] else "What it sees, or its plan,"
    lost = "" if plan else " Nothing reaches the goal from here."
    compact = env.field_schemas["cards"]["items"] == {"type": "integer"}
    return {
        "evaluation": ("The thought is right." if right else f"{wrong} is wrong.") + lost,
        "correct": right,
        "thought": {
            "cards": env.numbers if compact else [RANKS[card.rank] for card in env.cards],
            "formula": env.formula_text(),
            "thoughts": plan if plan and not right else thought["thoughts"],
        },
    }


def complete(body):
    """The message that answers a request for a chat completion."""
    messages = body["messages"]
    prompt, thought, image = read_question(messages)
    env = situation(prompt, image)
    if messages[-1]["role"] == "tool":
        solved = json.loads(messages[-1]["content"])
        if not isinstance(solved, dict) or "error" in solved:
            raise RequestError(f"the tool said: {solved}")
    else:
        asked = {"cards": [RANKS[card.rank] for card in env.cards], "formula": env.formula_text()}
        if body.get("tools") and body.get("tool_choice") != "none":
            function = {"name": "solve", "arguments": json.dumps(asked)}
            call = {"id": "call_0", "type": "function", "function": function}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        solved = env.tools[0].run(asked)
    return {"role": "assistant", "content": json.dumps(correction(env, thought, solved))}


def completion(body, message):
    """A message as a chat completion; four characters are counted as a token, pictures as nothing."""
    sent = re.sub("base64,[A-Za-z0-9+/=]*", "", json.dumps(body["messages"]))
    spent = [len(sent) // 4, len(json.dumps(message)) // 4]
    ended = "tool_calls" if message.get("tool_calls") else "stop"
    return {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": ended}],
        "usage": {
            "prompt_tokens": spent[0],
            "completion_tokens": spent[1],
            "total_tokens": sum(spent),
        },
    }


class Handler(BaseHTTPRequestHandler):
    """`GET /v1/models` and `POST /v1/chat/completions`."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        """The list of models."""
        if self.path == "/v1/models":
            self.reply(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        else:
            self.reply(404, {"error": {"message": f"no {self.path} here"}})

    def do_POST(self):
        """A chat completion."""
        length = self.headers.get("Content-Length", "0")
        if not re.fullmatch("[0-9]{1,9}", length):
            self.close_connection = True  # where the next request begins is not known
            self.reply(
                400, {"error": {"message": f"Content-Length: {length} is no number of bytes"}}
            )
            return
        data = self.rfile.read(int(length))
        if self.path != "/v1/chat/completions":
            self.reply(404, {"error": {"message": f"no {self.path} here"}})
            return
        try:
            body = json.loads(data)
            message = complete(body)
        except BAD_REQUESTS as error:
            self.reply(400, {"error": {"message": f"{type(error).__name__}: {error}"}})
            return
        self.reply(200, completion(body, message))

    def reply(self, status, body):
        """Send `body` as JSON."""
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format, *args):
        """Requests are not logged."""


def serve(port=0, handler=Handler):
    """A server on loopback; `port` 0 takes a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=8024)
    server = serve(parser.parse_args().port)
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()
