"""A prompt reaches the text encoder as it is written, through the host's own tokenizer."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from wan21.server.graph import as_written
from wan21.server.installed import BUNDLED

WRITTEN = [
    "a (red:1.2) ball",
    "((loud)) music (off)",
    "f(x) = (a + b) \\ c",
    "already escaped \\(word:1.3\\)",
    "a path C:\\films\\(1)\\",
    "an open ( and a smile :)",
    "embedding:cat",
    "the word\tembedding:EasyNegative, or\nembedding: alone",
    "notembedding:cat (embedding:cat)",
    "[square] {curly} <angle> 「日本」（全角）",  # noqa: RUF001
    "\0\1 \0\2 \0(",
    ")(",
    "()",
    "\\",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from comfy.text_encoders.wan import WanT5Tokenizer

    with safe_open(BUNDLED / "text_encoders" / "wan21-tiny-umt5.safetensors", "pt") as file:
        pieces = file.get_tensor("spiece_model")
    folder = tmp_path_factory.mktemp("embeddings")
    return WanT5Tokenizer([str(folder)], {"spiece_model": pieces})


def host_ids(tokenizer, text):
    """Token ids without the padding, as `CLIPTextEncode` has them; all of weight 1."""
    [tokens] = tokenizer.tokenize_with_weights(text)["umt5xxl"]
    ids, weights = zip(*tokens)
    assert set(weights) == {1.0}
    return list(ids[: max((i + 1 for i, token in enumerate(ids) if token), default=0)])


def plain_ids(tokenizer, text):
    return tokenizer.clip_umt5xxl.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("text", WRITTEN)
def test_a_prompt_is_text(tokenizer, text):
    assert host_ids(tokenizer, as_written(text)) == plain_ids(tokenizer, text)


def test_without_it_brackets_are_weights(tokenizer):
    with pytest.raises(AssertionError):
        host_ids(tokenizer, WRITTEN[0])


parts = st.sampled_from(["(", ")", "\\", ":", "1.2", "embedding:", " ", "\n", "\0", "\1", "\2", "cat", "é"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(parts | st.text(max_size=3), min_size=1).map("".join).filter(lambda text: text.strip("\0\1\2"))
)
def test_any_prompt_is_text(tokenizer, text):
    assert host_ids(tokenizer, as_written(text)) == plain_ids(tokenizer, text)


def test_both_prompts_are_escaped_and_shown_as_given(api, job):
    task = api.client.run(job(prompt="a (red:1.2) ball", negative_prompt="(blur)"), wait=False)
    graph = api.host.graphs[api.host.queue[-1]]
    texts = {n["_meta"]["title"]: n["inputs"].get("text") for n in graph.values()}
    assert texts["Positive prompt"] == r"a \(red:1.2\) ball" and texts["Negative prompt"] == r"\(blur\)"
    assert task["input"]["prompt"] == "a (red:1.2) ball"
