"""Text completions, and text as tokens, by real HTTP: with OpenAI's own client, and in vLLM's forms."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from served import GOOD, HELLO, MODEL, ScriptedScheduler, ScriptedStream, make_app, running, wait_until
from tiny_tokenizers import published
from tool_templates import FAMILIES, save_tokenizer

from twinloop.models.tokenizer import ChatTokenizer

TEXT = "damaged items reported"


@pytest.fixture
def official(client):
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)


def streamed(official, **request):
    """The texts of a stream by their index, its reasons for the end, and its usage."""
    texts, ends, usage = {}, {}, None
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in official.completions.create(model=MODEL.name, **request, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    return texts, ends, usage


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("kind", ["text", "texts", "ids", "lists of ids"])
def test_every_form_of_prompt_is_completed_whole_and_streamed_alike(official, tokenizer, kind, echo):
    ids = [tokenizer.encode_text(text) for text in (TEXT, "late items")]
    prompt = {"text": TEXT, "texts": [TEXT, "late items"], "ids": ids[0], "lists of ids": ids}[kind]
    request = {"prompt": prompt, "max_tokens": 9, "temperature": 0, "echo": echo}
    whole = official.completions.create(model=MODEL.name, **request)
    texts, ends, usage = streamed(official, **request)
    assert whole.object == "text_completion"
    assert [choice.index for choice in whole.choices] == ([0, 1] if kind in ("texts", "lists of ids") else [0])
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage
    assert whole.usage.prompt_tokens == sum(map(len, ids[: len(whole.choices)]))
    assert whole.usage.completion_tokens <= 9 * len(whole.choices)
    assert (TEXT in whole.choices[0].text) is echo


def test_a_text_and_its_ids_are_the_same_prompt_and_a_batch_answers_as_each_alone(official, tokenizer):
    def texts(prompt):
        request = {"prompt": prompt, "max_tokens": 12, "temperature": 1.0, "seed": 5}
        return [choice.text for choice in official.completions.create(model=MODEL.name, **request).choices]

    assert texts(TEXT) == texts(tokenizer.encode_text(TEXT))
    assert texts([TEXT, "late"]) == texts(TEXT) + texts("late")


def test_a_text_begins_as_the_models_texts_do_and_spells_no_special_token(scripted, script, tokenizer):
    scripted.post("/v1/completions", json={"prompt": "a<|end|>"})
    scripted.post("/v1/completions", json={"prompt": "a", "add_special_tokens": False})
    special, plain = script.prompts
    assert [id for id in special if id in tokenizer.special_ids] == [tokenizer.bos_id]
    assert plain == tokenizer.encode("a")


def test_every_prompt_has_n_answers_which_are_those_that_it_gets_alone(official, engine_scheduler):
    request = {"max_tokens": 12, "temperature": 1.0, "seed": 5, "n": 2}
    before = engine_scheduler.metrics().totals.prompt_tokens
    both = official.completions.create(model=MODEL.name, prompt=[TEXT, "late"], **request)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in both.choices}) == 4
    assert engine_scheduler.metrics().totals.prompt_tokens - before == both.usage.prompt_tokens
    alone = [official.completions.create(model=MODEL.name, prompt=prompt, **request) for prompt in (TEXT, "late")]
    assert [choice.text for choice in both.choices] == [choice.text for each in alone for choice in each.choices]
    texts, _, usage = streamed(official, prompt=[TEXT, "late"], **request)
    assert [texts[index] for index in range(4)] == [choice.text for choice in both.choices]
    assert usage.completion_tokens == both.usage.completion_tokens


def test_logprobs_are_of_the_tokens_of_the_text(official):
    request = {"model": MODEL.name, "prompt": TEXT, "max_tokens": 12, "temperature": 1.0, "seed": 6}
    choice = official.completions.create(**request, logprobs=3).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) > 0
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    whole = True
    for token, logprob, top, offset in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset, strict=True
    ):
        assert 3 <= len(top) <= 4
        assert top[token] == logprob <= max(top.values()) <= 0
        whole = whole and not token.startswith("bytes:")  # a character that is cut has no place of its own
        assert not whole or choice.text[offset:].startswith(token)
    pieces = [chunk.choices[0].logprobs for chunk in official.completions.create(**request, logprobs=3, stream=True)]
    assert [token for each in pieces if each for token in each.tokens] == logprobs.tokens
    assert official.completions.create(**request).choices[0].logprobs is None


def test_each_reported_token_is_at_its_place_in_the_text(scripted):
    choice = scripted.post("/v1/completions", json={"prompt": TEXT, "logprobs": 0, "stop": "days"}).json()["choices"][0]
    logprobs, end = choice["logprobs"], 0
    for token, offset, top in zip(logprobs["tokens"], logprobs["text_offset"], logprobs["top_logprobs"], strict=True):
        assert (offset, list(top)) == (end, [token])
        end += len(token)
    assert "".join(logprobs["tokens"]).startswith(choice["text"])


def test_openais_default_length_is_kept_and_stop_strings_end_a_text(scripted, script, tokenizer):
    short = scripted.post("/v1/completions", json={"prompt": TEXT}).json()
    assert (short["usage"]["completion_tokens"], short["choices"][0]["finish_reason"]) == (16, "length")
    stopped = scripted.post("/v1/completions", json={"prompt": TEXT, "max_tokens": 200, "stop": ["days"]}).json()
    assert stopped["choices"][0] == {
        "index": 0, "text": GOOD[: GOOD.index("days")], "logprobs": None, "finish_reason": "stop",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"prompt": ""}, None, None),
        ({"prompt": []}, "prompt", None),
        ({"prompt": [[]]}, "prompt.0", None),
        ({"prompt": [-1]}, "prompt.0", None),
        ({"prompt": [1, "a"]}, "prompt.1", None),
        ({"prompt": [1.5]}, "prompt.0", None),
        ({"prompt": None}, "prompt", None),
        ({"prompt": [10**9]}, "prompt", "unknown_token"),
        ({"prompt": [10**30]}, "prompt", "unknown_token"),
        ({"prompt": ["a"] * 13}, "prompt", "too_many_prompts"),
        ({"prompt": "word " * 2000}, "prompt", "context_length_exceeded"),
        ({"max_tokens": 10**6}, "prompt", "context_length_exceeded"),
        ({"max_tokens": 0}, "max_tokens", "unsupported_parameter"),
        ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens", "unsupported_parameter"),
        ({"max_tokens": -1}, "max_tokens", None),
        ({"suffix": "end"}, "suffix", "unsupported_parameter"),
        ({"prompt": ["a"] * 7, "n": 2}, "n", "unsupported_parameter"),
        ({"logprobs": 21}, "logprobs", None),
        ({"min_tokens": 17}, "min_tokens", "unsupported_parameter"),
        ({"messages": HELLO}, "messages", "unsupported_parameter"),
    ],
)
def test_what_cannot_be_completed_is_refused_by_its_field(client, change, param, code):
    answer = client.post("/v1/completions", json={"prompt": TEXT, **change})
    if param is None:  # this model begins every text with a token of its own
        assert answer.status_code == 200
        return
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error["message"]


def test_another_model_is_not_found(official):
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        official.completions.create(model="gpt-4", prompt=TEXT)


def test_a_request_of_several_prompts_takes_a_place_for_each_or_none(client, engine_scheduler):
    held = [engine_scheduler.reserve() for _ in range(engine_scheduler.capacity - 1)]
    for _ in range(2):
        refused = client.post("/v1/completions", json={"prompt": ["a", "b"]})
        assert refused.json()["error"]["code"] == "queue_full"
    assert client.post("/v1/completions", json={"prompt": ["a"], "max_tokens": 2}).status_code == 200
    for place in held:
        with place:
            pass
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(client.post, "/v1/completions", json={"prompt": ["a"] * 4, "max_tokens": 2})] * 3
        assert {each.result().status_code for each in asked} == {200}


def test_a_client_that_leaves_a_stream_of_several_frees_all_their_slots(client, engine_scheduler):
    request = {"prompt": [TEXT] * 3, "max_tokens": 300, "stream": True, "temperature": 1.0}
    with (
        httpx.Client(base_url=client.base_url, trust_env=False) as leaving,
        leaving.stream("POST", "/v1/completions", json=request) as response,
    ):
        next(response.iter_lines())
        assert engine_scheduler.active > 0
    wait_until(lambda: engine_scheduler.active == 0)


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["hello", "grüße 漢字 🙂", " two  spaces\n", "<|end|>", ""])
def test_a_text_becomes_tokens_and_text_again(client, tokenizer, text):
    tokens = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert set(tokens) == {"count", "max_model_len", "tokens", "token_strs"}
    assert (tokens["count"], tokens["max_model_len"]) == (len(tokens["tokens"]), 384)
    assert client.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}
    whole = client.post("/tokenize", json={"model": MODEL.name, "prompt": text, "return_token_strs": True}).json()
    assert whole["tokens"] == [tokenizer.bos_id, *tokens["tokens"]]
    assert whole["token_strs"][0] == "<|bos|>"
    assert tokens["token_strs"] is None


def test_messages_become_the_tokens_that_a_chat_with_them_is_asked_with(scripted, script, tokenizer):
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "Be brief."}, *HELLO]
        scripted.post("/v1/chat/completions", json={"messages": messages})
        tokens = scripted.post("/tokenize", json={"messages": messages}).json()["tokens"]
        assert tokens == script.prompts[-1]
        shown = scripted.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
        assert shown.startswith("<|bos|><|system|>Be brief.<|end|><|user|>")
        assert shown.endswith("<|end|><|assistant|>")
        whole = {"messages": messages, "add_generation_prompt": False}
        assert scripted.post("/tokenize", json=whole).json()["tokens"] == tokens[:-1]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"messages": [{"role": "tool", "content": "a", "tool_call_id": "b"}]}, "messages.0.role"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
    ],
)
def test_what_is_no_text_and_no_tokens_is_refused_by_its_field(client, path, body, param):
    answer = client.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize("family", FAMILIES)
def test_what_comes_before_a_text_is_what_the_tokenizers_own_file_says(family, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = save_tokenizer(FAMILIES[family], tmp_path)
    path = tmp_path / "tokenizer.json"
    for step in (
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "first", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"first": {"id": "first", "ids": [tokenizer.eos_id], "tokens": ["first"]}},
        },
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": step}))
        ours, theirs = type(tokenizer).load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        assert ours.encode_text("an order") == theirs("an order")["input_ids"]


class Continues(ScriptedScheduler):
    """Answers with these ids."""

    def __init__(self, tokenizer, ids):
        super().__init__(tokenizer)
        self.ids = ids

    def submit(self, prompt, params):
        return ScriptedStream(prompt, params, self.ids, 0.0, "length")


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_a_completion_begins_with_the_space_that_its_first_token_has(tmp_path, name, as_ids, echo):
    """Tokenizers of SentencePiece put a space before a text, which decoding a whole text leaves out."""
    tokenizer = ChatTokenizer.load(published(name, tmp_path / "model"))
    prompt, whole = (tokenizer.encode_text(text) for text in ("The order was", "The order was damaged"))
    assert whole[: len(prompt)] == prompt
    request = {"prompt": prompt if as_ids else "The order was", "max_tokens": 20, "logprobs": 1, "echo": echo}
    with running(make_app(tmp_path, Continues(tokenizer, whole[len(prompt) :]), tokenizer)) as client:
        choice = client.post("/v1/completions", json=request).json()["choices"][0]
        lines = client.post("/v1/completions", json=request | {"stream": True}).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    before = (tokenizer.decode_all(prompt) if as_ids else "The order was") if echo else ""
    assert choice["text"] == before + " damaged" == "".join(chunk["choices"][0]["text"] for chunk in chunks)
    logprobs, skipped = choice["logprobs"], len(prompt) if echo else 0
    assert "".join(logprobs["tokens"][skipped:]) == " damaged"
    assert logprobs["text_offset"][skipped] == len(before)


def test_a_completion_of_nothing_is_a_whole_text(tmp_path):
    tokenizer = ChatTokenizer.load(published("llama2", tmp_path / "model"))
    with running(make_app(tmp_path, Continues(tokenizer, tokenizer.encode("damaged")), tokenizer)) as client:
        choice = client.post("/v1/completions", json={"prompt": ""}).json()["choices"][0]
    assert choice["text"] == "damaged"
