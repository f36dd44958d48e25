"""Output held to JSON schemas and regular expressions: by llguidance, judged by jsonschema and re."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import EOS
from conftest import Backend
from lococo_runtime import LLM, Chat, Grammar, GrammarError, NotFoundError, SamplingParams
from test_llm import SMOLLM2, smollm2

from lococo_export import export_bundle, load_checkpoint

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is missing: it judges what is written")
pytest.importorskip("llguidance", reason="llguidance is missing: pip install 'lococo-export[grammar]'")

SCHEMAS: dict[str, dict[str, Any]] = {
    "record": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["a", "é", "漢字"]}, "maxItems": 3},
            "ok": {"type": "boolean"},
        },
        "required": ["name", "age", "ok"],
        "additionalProperties": False,
    },
    "choice": {"anyOf": [{"const": None}, {"type": "number", "minimum": -1, "maximum": 1, "multipleOf": 0.5}]},
    "nested": {
        "$defs": {"leaf": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}},
        "type": "array",
        "prefixItems": [{"$ref": "#/$defs/leaf"}, {"type": "string", "pattern": "^[a-c]{2,4}$"}],
        "minItems": 2,
        "items": False,
    },
}
REGEXES = [r"[a-z]{3,8}@[a-z]{2,5}\.(com|org)", r"(ja|nein|vielleicht)", r"\d{4}-(0[1-9]|1[0-2])", "日本(語|人)?", ""]


@pytest.fixture(scope="module")
def llm(backend: Backend) -> Iterator[LLM]:
    with LLM(backend.bundle("grammar"), **backend.options) as opened:
        yield opened


def params(seed: int, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": seed, "max_tokens": 400, **changes})


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_is_valid_under_its_schema(llm: LLM, name: str) -> None:
    grammar = Grammar.json_schema(SCHEMAS[name])
    seen = set()
    for seed in range(20):
        out = llm.generate("Give me JSON: ", params(seed), grammar=grammar)
        assert (out.finish_reason, out.stop_reason) == ("stop", None)
        value = json.loads(out.text)
        jsonschema.validate(value, SCHEMAS[name], jsonschema.Draft202012Validator)
        seen.add(out.text)
    assert len(seen) > 1


@pytest.mark.parametrize("pattern", REGEXES)
def test_text_matches_its_regex(llm: LLM, pattern: str) -> None:
    for seed in range(10):
        for temperature in (0.0, 2.0):
            stream = llm.generate_stream("x", params(seed, temperature=temperature), grammar=Grammar.regex(pattern))
            text = "".join(stream)
            assert re.fullmatch(pattern, text), text
            assert stream.output.finish_reason == "stop"
            assert "�" not in text


def test_any_object_and_schema_text(llm: LLM) -> None:
    grammar = Grammar.json_schema('{"type": "object", "maxProperties": 0}')
    assert llm.generate("x", params(0), grammar=grammar).text == "{}"
    out = llm.generate("x", params(1, max_tokens=3), grammar=Grammar.json_schema({"type": "array", "minItems": 9}))
    assert (out.finish_reason, out.text[0]) == ("length", "[")


def test_the_model_ends_what_the_grammar_leaves_open(llm: LLM) -> None:
    """End-of-sequence and stop tokens are allowed where the text may end, and nowhere else."""
    a = llm.encode("a")[0]
    b = llm.encode("b")[0]
    eager = {EOS: 50.0}
    out = llm.generate("x", params(0, logit_bias=eager), grammar=Grammar.regex("a{3}a*"))
    assert (out.text, out.token_ids, out.finish_reason) == ("aaa", [a, a, a, EOS], "stop")
    out = llm.generate("x", params(0, logit_bias=eager, ignore_eos=True, max_tokens=9), grammar=Grammar.regex("a{3}a*"))
    assert (out.token_ids, out.finish_reason) == ([a] * 9, "length")
    out = llm.generate(
        "x", params(0, logit_bias={b: 50.0}, stop_token_ids=[b], ignore_eos=True), grammar=Grammar.regex("a{3}a*")
    )
    assert (out.text, out.stop_reason) == ("aaa", b)
    out = llm.generate("x", params(0, stop=["aa"]), grammar=Grammar.regex("ba{5}"))
    assert (out.text, out.stop_reason) == ("b", "aa")


def test_other_parameters_choose_among_what_is_allowed(llm: LLM) -> None:
    grammar = Grammar.regex("[ab]{10}")
    a = llm.encode("a")[0]
    assert llm.generate("x", params(0, logit_bias={a: 50.0}), grammar=grammar).text == "a" * 10
    out = llm.generate("x", params(3, top_k=1, repetition_penalty=1.3, logprobs=2), grammar=grammar)
    assert re.fullmatch("[ab]{10}", out.text)
    assert out.logprobs is not None
    assert [entry.token_id for entry in out.logprobs] == out.token_ids


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Grammar.regex("("), "unclosed"),
        (lambda: Grammar.regex("(?=a)b"), "look-around"),
        (lambda: Grammar.regex(r"[^\s\S]"), "nothing satisfies"),
        (lambda: Grammar.regex("\ud800"), "surrogates"),
        (lambda: Grammar.regex(5), "string"),  # type: ignore[arg-type]
        (lambda: Grammar.json_schema({"enum": []}), "Unsatisfiable"),
        (lambda: Grammar.json_schema({"allOf": [{"type": "string"}, {"type": "number"}]}), "Unsatisfiable"),
        (lambda: Grammar.json_schema({"type": "wat"}), "wat"),
        (lambda: Grammar.json_schema({"not": {}}), "Unimplemented"),
        (lambda: Grammar.json_schema({"not": {}, "x-guidance": {"lenient": True}}), "Unimplemented"),
        (lambda: Grammar.json_schema({"$ref": "#/nowhere"}), "nowhere"),
        (lambda: Grammar.json_schema({"$ref": "http://localhost/x"}), "localhost"),
        (lambda: Grammar.json_schema("{"), "JSON"),
        (lambda: Grammar.json_schema("[1]"), "object"),
        (lambda: Grammar.json_schema({"a": object()}), "object"),
    ],
)
def test_bad_grammars_are_refused_before_anything_is_read(llm: LLM, make: Any, says: str) -> None:
    with llm.model.session() as session:
        with pytest.raises(GrammarError, match=says):
            llm.generate("x", grammar=make(), session=session)
        assert session.position == 0
        assert llm.generate("x", params(0), grammar=Grammar.regex("ab"), session=session).text == "ab"


def test_a_dead_end_in_the_middle_leaves_a_conversation_usable(llm: LLM) -> None:
    """The vocabulary can begin this text, and not end it: logit_bias takes away a token that the grammar needs."""
    b = llm.encode("b")[0]
    with Chat(llm) as chat:
        before = chat.send("Hi", params(0), grammar=Grammar.regex("abc"))
        assert before.text == "abc"
        stream = chat.stream("Hi", params(0, logit_bias={b: -3.4e38}), grammar=Grammar.regex("abc"))
        text = "".join(stream)
        assert text == "abc"  # a bias is a preference: what the grammar demands is still chosen
        assert chat.send("Hi", params(0), grammar=Grammar.regex("[xy]")).text in "xy"


def test_grammars_need_the_library(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.delitem(llm.__dict__, "_grammars", raising=False)
    with pytest.raises(NotFoundError, match=r"lococo-export\[grammar\]"):
        llm.generate("x", grammar=Grammar.regex("a"))


@pytest.mark.parametrize("_", [pytest.param(None, marks=smollm2)])
def test_smollm2_answers_in_json(tmp_path: Path, _: None) -> None:
    export_bundle(load_checkpoint(SMOLLM2, policy="h2o", mem_size=256, block_size=256), tmp_path / "bundle")
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 18}, "tall": {"type": "boolean"}},
        "required": ["age", "tall"],
    }
    question = [{"role": "user", "content": "How old are you, and are you tall? Answer in JSON."}]
    with LLM(tmp_path / "bundle") as llm:
        out = llm.chat(question, params(0, temperature=0.7, max_tokens=100), grammar=Grammar.json_schema(schema))
    jsonschema.validate(json.loads(out.text), schema)
    assert out.finish_reason == "stop"
