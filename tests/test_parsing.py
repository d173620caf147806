import json
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtr_turbo.envs.cards.blackjack import BlackjackEnv
from gtr_turbo.envs.cards.numberline import NumberLineEnv
from gtr_turbo.envs.cards.points import EZPointsEnv, Points24Env
from gtr_turbo.parsing import _stands, parse, thought_tokens, token_texts

KEYS = ("thoughts", "action")

# reply, its action, and the text where the action's part begins
VALID = {
    "plain": ('{"thoughts": "a", "action": "5"}', "5", '"action": "5"}'),
    "pretty": ('{\n  "thoughts": "a",\n  "action": "+"\n}', "+", '"action": "+"\n}'),
    "code fence": (
        '```json\n{"thoughts": "a", "action": "5"}\n```',
        "5",
        '"action": "5"}\n```',
    ),
    "text before": ('Sure! Here: {"thoughts": "a", "action": "5"}', "5", '"action": "5"}'),
    "text after": (
        '{"thoughts": "a", "action": "5"} I hope so.',
        "5",
        '"action": "5"} I hope so.',
    ),
    "second object": (
        '{"thoughts": "a", "action": "5"}{"thoughts": "b", "action": "6"}',
        "5",
        '"action": "5"}{"thoughts": "b", "action": "6"}',
    ),
    "single quotes": ("{'thoughts': 'a', 'action': '5'}", "5", "'action': '5'}"),
    "apostrophe": ("{'thoughts': \"it's\", 'action': '5'}", "5", "'action': '5'}"),
    "bare keys": ('{thoughts: "a", action: "5"}', "5", 'action: "5"}'),
    "trailing comma": ('{"thoughts": "a", "action": "5",}', "5", '"action": "5",}'),
    "missing comma": ('{"thoughts": "a" "action": "5"}', "5", '"action": "5"}'),
    "quotes inside": ('{"thoughts": "go "on" now", "action": "5"}', "5", '"action": "5"}'),
    "newline in a string": ('{"thoughts": "a\nb", "action": "5"}', "5", '"action": "5"}'),
    "control characters": ('{"thoughts": "a\x00\x1b[2J", "action": "5"}', "5", '"action": "5"}'),
    "Python's True": ('{"thoughts": True, "action": "5"}', "5", '"action": "5"}'),
    "nested action": (
        '{"thoughts": {"action": "1"}, "action": "5"}',
        "5",
        '"action": "5"}',
    ),
    "action in a thought": (
        r'{"thoughts": "so \"action\": \"7\"", "action": "5"}',
        "5",
        '"action": "5"}',
    ),
    "brackets in a thought": ('{"thoughts": "}]{[", "action": "5"}', "5", '"action": "5"}'),
    "number": ('{"thoughts": "a", "action": 10}', "10", '"action": 10}'),
    "negative number": ('{"thoughts": "a", "action": -3}', "-3", '"action": -3}'),
    "blanks": ('{"thoughts": "a", "action" :  " + "}', "+", '"action" :  " + "}'),
    "many blanks": (
        '{"thoughts": "a", "action"' + " " * 90 + ': "5"}',
        "5",
        '"action"' + " " * 90 + ': "5"}',
    ),
    "emoji": ('{"thoughts": "🂡🃏", "action": "5"}', "5", '"action": "5"}'),
    "lone surrogate": ('{"thoughts": "\ud800", "action": "5"}', "5", '"action": "5"}'),
    "escaped surrogate": (r'{"thoughts": "\ud800", "action": "5"}', "5", '"action": "5"}'),
    "escaped key": (
        r'{"thoughts": "\"action\":", "\u0061ction": "5"}',
        "5",
        r'"\u0061ction": "5"}',
    ),
    "keys after the action": (
        '{"thoughts": "a", "action": "5", "why": "b"}',
        "5",
        '"action": "5", "why": "b"}',
    ),
    "two thoughts": (
        '{"thoughts": "a", "thoughts": "b", "action": "5"}',
        "5",
        '"action": "5"}',
    ),
    # the last action is played, and nothing from the first on is thought
    "two actions": (
        '{"thoughts": "a", "action": "1", "action": "2"}',
        "2",
        '"action": "1", "action": "2"}',
    ),
    # a repair reads these keys, so that no later text that looks like one is where the action begins
    "curly quotes": (
        '{“thoughts”: "a", “action”: "5", "why": "my action: 7"}',
        "5",
        'action”: "5", "why": "my action: 7"}',
    ),
    "missing colon": (
        '{"thoughts": "a", "action" "5", "why": "my action: 7"}',
        "5",
        '"action" "5", "why": "my action: 7"}',
    ),
    "two repaired objects": (
        "{'thoughts': 'a', 'action': '1'} {'thoughts': 'b', 'action': '2'}",
        "1",
        "'action': '1'} {'thoughts': 'b', 'action': '2'}",
    ),
    # where the action might begin is a word of the thought: cautious, as no thought is trained then
    "its name in a long thought": (
        '{"thoughts": "Cards 3, 4.\nBest action: add 5.", "action": "5"}',
        "5",
        'action: add 5.", "action": "5"}',
    ),
    "itself in a long thought": (
        '{"thoughts": "Cards 3, 4.\nBest action: 5.", "action": "5"}',
        "5",
        'action: 5.", "action": "5"}',
    ),
    "comment": ("{'thoughts': 'a', 'action': '5' // done\n}", "5", "'action': '5' // done\n}"),
    "escapes": (
        r"{'thoughts': 'a', 'action': '8\u00D72\n'}",
        "8×2",
        r"'action': '8\u00D72\n'}",
    ),
    "full stop": ("{'thoughts': 'a', 'action': 'stand'.}", "stand", "'action': 'stand'.}"),
    "bare words": (
        "{'thoughts': 'a', 'action': go to fridge 1}",
        "go to fridge 1",
        "'action': go to fridge 1}",
    ),
    "bare difference": ("{'thoughts': 'a', 'action': 8-4-1}", "8-4-1", "'action': 8-4-1}"),
    "bare action, then a key": (
        "{'thoughts': 'a', 'action': 5 'why': 3}",
        "5",
        "'action': 5 'why': 3}",
    ),
    "escaped quote": (r"{'thoughts': 'a', 'action': 'it\'s'}", "it's", r"'action': 'it\'s'}"),
    "empty action": ('{"thoughts": "a", "action": ""}', "", '"action": ""}'),
}

INVALID = {
    "empty": "",
    "prose": "I would play 5.",
    "no opening brace": '"thoughts": "a", "action": "5"}',
    "no closing brace": '{"thoughts": "a", "action": "5"',
    "truncated in the thought": '{"thoughts": "I see two cards, a 5 and',
    "truncated in the action": '{"thoughts": "a", "action": "',
    "nested brace missing": '{"thoughts": {"a": 1, "action": "5"}',
    "key missing": '{"action": "5"}',
    "action missing": '{"thoughts": "a"}',
    "other case": '{"thoughts": "a", "Action": "5"}',
    "list of objects": '[{"thoughts": "a"}, {"action": "5"}]',
    "action first": '{"action": "5", "thoughts": "a"}',
    "action first, single quotes": "{'action': '5', 'thoughts': \"the 'action': is\"}",
    "action first, bare": '{action: "5", "thoughts": "a"}',
    "action before and after": '{"action": "1", "thoughts": "a", "action": "2"}',
    "thoughts before and after": '{"thoughts": "a", "action": "5", "thoughts": "b"}',
    "action hidden by an escape": r"""{"\u0061ction": "5", "thoughts": "'action':"}""",
    "key that only a repair reads": r"""{'thoughts': 'a', "\u0061ction": '5', 'why': 'action: 7'}""",
    "action true": '{"thoughts": "a", "action": true}',
    "action null": '{"thoughts": "a", "action": null}',
    "action a list": '{"thoughts": "a", "action": ["5"]}',
    "action an object": '{"thoughts": "a", "action": {"action": "5"}}',
    "action a float": '{"thoughts": "a", "action": 5.0}',
    # what a repair leaves of these is another move, or none
    "bare formula": "{'thoughts': 'a', 'action': (8-4)*6}",
    "bare product": "{'thoughts': 'a', 'action': 8*3*(4-2)/2}",
    "bare sign": '{"thoughts": "a", "action": =}',
    "quotes in bare words": "{'thoughts': 'a', 'action': go to \"fridge\" 1}",
    "half a formula quoted": """{'thoughts': 'a', 'action': '8-4'*6}""",
    "blanks to no end": "{'thoughts': 'a', 'action'" + " " * 19_000 + "(}",
    "deep": "[" * 100_000,
    "deep object": '{"a":' * 100_000,
    "deep thought": '{"thoughts": ' + "[" * 900 + "]" * 900 + ', "action": "5"}',
    # on these json_repair fails by an assertion of its own
    "code fence in a key": '{"thoughts": "x", "```json {"action": "5"}``` }',
    "object in a code fence in a key": '{"```json\n{"thoughts": "a", "action": "5"}\n```}',
    "action without an end": "{'thoughts': 'a', 'action': '" + "é" * 1_001 + "'}",
    "calls": "{(" * 9_000 + "}",
    "quotes only": "{" + '"' * 19_000 + "}",
    "single quotes only": "{" + "'" * 19_000 + "}",
    "comments": "{" + "/*" * 9_000 + "}",
}


@pytest.mark.parametrize(
    "before", ["Set {7, 5}. ", '<think>{"a": 1}</think>\n', "{} ", "{a}{b}{c}", "\u2028{"]
)
@pytest.mark.parametrize("behind", ["", " Done."])
def test_an_object_behind_other_braces_is_read(before, behind):
    reply = '{"thoughts": "x", "action": "1"}'
    parsed = parse(before + reply + behind, ("thoughts", "action"))
    closed = before.count("{") == before.count("}")
    assert parsed.valid is (closed or not behind)
    if closed:
        assert (parsed.action, parsed.action_start) == ("1", len(before) + reply.index('"action"'))


def test_an_object_inside_one_that_was_cut_is_not_the_reply():
    cut = '{"thoughts": {"thoughts": "x", "action": "1"}, "formula": "'
    assert not parse(cut, ("thoughts", "action")).valid


def test_windows_ends_of_lines_are_blanks():
    assert parse("{'thoughts': 'x', 'action': '1'}\r\n", ("thoughts", "action")).valid


def test_a_character_of_several_tokens_is_the_text_of_the_last():
    decode = lambda ids: bytes(ids).decode("utf-8", "replace")  # noqa: E731
    text = "é 🂡.红"
    texts = token_texts(list(text.encode()), decode)
    assert texts == ["", "é", " ", "", "", "", "🂡", ".", "", "", "红"]
    assert token_texts(list("aé".encode())[:2], decode) == ["a", "\ufffd"]  # cut off
    assert token_texts([0x80] * 5, decode) == ["", "", "", "\ufffd" * 4, "\ufffd"]


@pytest.mark.parametrize("name", VALID)
def test_a_closed_object_with_small_faults_is_read(name):
    text, action, rest = VALID[name]
    parsed = parse(text, KEYS)
    assert parsed.valid
    assert parsed.action == action
    assert text[parsed.action_start :] == rest


@pytest.mark.parametrize("name", INVALID)
def test_anything_else_is_invalid_and_empty(name):
    parsed = parse(INVALID[name], KEYS)
    assert (parsed.valid, parsed.action, parsed.action_start) == (False, "", 0)
    assert not parsed.fields


def test_fields_hold_the_values():
    text = '{"cards": ["10", 2], "formula": "10+", "thoughts": "10+2", "action": "2"}'
    parsed = parse(text, ("cards", "formula", "thoughts", "action"))
    assert parsed.fields == {
        "cards": ["10", 2],
        "formula": "10+",
        "thoughts": "10+2",
        "action": "2",
    }
    assert not parse(text, ("cards", "dealer", "action")).valid


KEYWORDS = ['"thoughts"', '"action"', "'action'", "action", "\\u0061ction", '"5"', "true", "NaN"]
SIGNS = [*":, \n{}[]\"'\\5-.#()", "e9", "```", "```json", "//", "/*", "\ud800", "😀", "\x00"]
pieces = st.sampled_from(KEYWORDS + SIGNS)


@settings(max_examples=800, deadline=1000)
@given(st.lists(pieces, max_size=40).map("".join) | st.text(max_size=200))
def test_no_text_raises_or_takes_long(text):
    for reply in (text, "{" + text + "}", '{"thoughts": "' + text + '", "action": "5"}'):
        parsed = parse(reply, KEYS)
        if parsed.valid:
            assert set(KEYS) <= set(parsed.fields)
            assert "action" in reply[parsed.action_start :] or "\\u" in reply
        else:
            assert parsed.action_start == 0


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.text(max_size=10))
def test_the_action_begins_where_json_put_it(thought, action):
    for ascii_only in (True, False):
        head = json.dumps({"thoughts": thought}, ensure_ascii=ascii_only)[:-1] + ", "
        tail = json.dumps({"action": action}, ensure_ascii=ascii_only)[1:]
        parsed = parse(head + tail, KEYS)
        assert parsed.valid
        assert parsed.fields == {"thoughts": thought, "action": action}
        assert parsed.action_start == len(head)


def decoder(tokens):
    return lambda ids: "".join(tokens[i] for i in ids)


def test_a_token_across_the_boundary_belongs_to_the_action():
    tokens = ['{"thoughts": "', "a", '", "', "action", '": "', "5", '"}']
    text = "".join(tokens)
    start = parse(text, KEYS).action_start
    # the quote at `start` is the last character of token 2, whose first three end the thought
    assert start == len('{"thoughts": "a", ')
    assert thought_tokens(range(7), start, decoder(tokens)) == 2
    # cut between them, the third token belongs to the thought
    split = ['{"thoughts": "', "a", '", ', '"action', '": "', "5", '"}']
    assert thought_tokens(range(7), start, decoder(split)) == 3


@pytest.mark.parametrize("start", range(11))
def test_the_thought_is_the_longest_prefix_within_its_characters(start):
    tokens = ["ab", "", "c", "defg", "h", "ij"]
    # ends of the tokens: 2, 2, 3, 7, 8, 10
    expected = [0, 0, 2, 3, 3, 3, 3, 4, 5, 5, 6]
    count = thought_tokens(range(6), start, decoder(tokens))
    assert count == expected[start]
    thought, action = decoder(tokens)(range(count)), decoder(tokens)(range(count, 6))
    assert thought + action == "abcdefghij"


def test_no_tokens_have_no_thought():
    assert thought_tokens([], 0, decoder([])) == 0


@pytest.fixture(scope="module")
def words():
    from gtr_turbo.policy import starter

    return starter.tokenizer()


def _decode(words):
    return lambda ids: words.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


GAMES = {
    "NumberLine": NumberLineEnv(),
    "EZPoints": EZPointsEnv(),
    "Points24": Points24Env(),
    "Points24 by reduction": Points24Env(granularity="reduction"),
    "Blackjack": BlackjackEnv(),
}
VALUES = {
    "cards": '["10", "2"]',
    "formula": '"10+"',
    "thoughts": '"10+2=12"',
    "current number": '"3"',
    "target number": '"5"',
}


@pytest.mark.parametrize("game", GAMES)
def test_the_tiny_tokenizer_never_puts_an_action_into_the_thought(game, words):
    env = GAMES[game]
    _, info = env.reset(seed=3)
    actions = [*info["actions"], "(1+2+5)*3", "no such action", ""]
    separator = ', "action": "'
    for action in actions:
        head = ", ".join(f'"{key}": {VALUES[key]}' for key in env.fields[:-1])
        text = "{" + head + separator + action + '"}'
        ids = words(text, add_special_tokens=False)["input_ids"]
        parsed = parse(text, env.fields)
        count = thought_tokens(ids, parsed.action_start, _decode(words))
        # the separator is one token, closing quote of the thought included, and not thought
        thought, rest = _decode(words)(ids[:count]), _decode(words)(ids[count:])
        assert thought == "{" + head[:-1]
        assert rest == '"' + separator + action + '"}'
        action_ids = words(action, add_special_tokens=False)["input_ids"]
        assert ids[count + 1 : -1] == action_ids
        assert parsed.action == action


@pytest.mark.parametrize("thought", ["🂡", "a 🂡 b", "é", "日本", "👩‍🚀", "\N{WHITE SMILING FACE}"])
def test_characters_of_several_tokens_stay_in_the_thought(thought, words):
    text = '{"thoughts": "' + thought + '", "action": "hit"}'
    ids = words(text, add_special_tokens=False)["input_ids"]
    count = thought_tokens(ids, parse(text, KEYS).action_start, _decode(words))
    assert _decode(words)(ids[:count]) == '{"thoughts": "' + thought


def test_a_target_of_imitation_is_the_reply_with_its_end_token(tiny):
    from gtr_turbo.policy.processing import Processor

    processor = Processor(tiny, "qwen3_vl")
    for action in [*GAMES["Points24"].reset(seed=0)[1]["actions"], "stand", "hit"]:
        text = json.dumps({"thoughts": "10+2=12", "action": action})
        *ids, last = processor.reply_ids(text).tolist()
        assert last == processor.end_token_id
        assert processor.decode(ids) == text
        assert parse(processor.decode(ids), KEYS).action == action
        # what is written must not hold the end token in its middle
        assert processor.end_token_id not in ids
    assert processor.decode(processor.reply_ids("a<|im_end|>b")) == "ab<|im_end|>"


@pytest.fixture
def alarm():
    """Ends what takes 30 seconds: a pattern that fits in many ways would take years."""

    def over(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "action",
    [
        "=30=30 " + "against " * 11 + "(10 " + "against " * 40,  # both from runs that hung
        '8/(10-+3)*2=24)=64, 16+5)*{"thoughts":',
        "\\" * 50,
        "é\n" * 500,
        "'\"" * 500,
    ],
)
def test_an_action_that_nearly_stands_in_a_faulty_reply_takes_no_time(action, alarm):
    written = json.dumps(action)[1:-1]
    for text in (action, written, written + "\\" * 25, written.replace("\\u00e9", "\\u00E9")):
        assert not _stands(action, f'"action": "{text}" x', 0)
        parse(f"{{'thoughts': 't', 'action': \"{text}\" x}}", KEYS)


def test_a_backslash_stands_there_as_it_is_or_escaped():
    for text in ("a\\b\\", "a\\\\b\\\\"):
        assert _stands("a\\b\\", f'"action": "{text}"', 0)
    assert not _stands("a\\b\\", '"action": "ab"', 0)
    assert _stands("é 2", '"action": "\\u00E9 2"', 0)
    assert _stands("é 2", '"action": "é 2"', 0)
