"""One document changes, all others stay byte for byte, and comments stay where they are."""

import json
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ztunnel.store.documents import parse, parse_yaml
from ztunnel.store.editing import merge_patch, remove_document, replace_document


def replaced(text: str, index: int, data: Any, *, is_json: bool = False) -> str:
    return replace_document(text, parse(text, is_json), index, data, is_json)


def removed(text: str, index: int, *, is_json: bool = False) -> str:
    return remove_document(text, parse(text, is_json), index, is_json)


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        # The table of RFC 7386, appendix A.
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patches(target: Any, patch: Any, result: Any) -> None:
    assert merge_patch(target, patch) == result


COMMENTED = """\
# The shop's file.
apiVersion: v1   # core
kind: Namespace
metadata:
  # who
  name: shop     # its name
  labels:
    team: 'blue' # quoted
    tier: "1"

# about the pod
---  # the pod
kind: Pod
spec:
    containers:
      - name: a   # first
        args: ["x",   "y"]
      # before b
      - name: b
    text: |
        several

        lines

# end
...
# after the end
---
last: true
"""


def test_a_change_keeps_comments_quotes_and_indentation() -> None:
    data = parse_yaml(COMMENTED)[0].data
    data["metadata"]["labels"]["team"] = "green"
    data["metadata"]["labels"]["istio.io/dataplane-mode"] = "ambient"
    assert replaced(COMMENTED, 0, data) == COMMENTED.replace("'blue' #", "'green' #").replace(
        '    tier: "1"\n', '    tier: "1"\n    istio.io/dataplane-mode: ambient\n'
    )


def test_a_change_in_the_middle_keeps_marker_end_and_lists() -> None:
    data = parse_yaml(COMMENTED)[1].data
    data["spec"]["containers"].append({"name": "c"})
    result = replaced(COMMENTED, 1, data)
    assert result.startswith(COMMENTED[: COMMENTED.index("kind: Pod")])
    assert result.endswith("\n# end\n...\n# after the end\n---\nlast: true\n")
    for kept in (
        "      - name: a   # first\n",
        "      # before b\n",
        "    text: |\n        several\n\n        lines\n",
    ):
        assert kept in result
    assert "      - name: c\n" in result


def test_texts_that_would_be_read_as_something_else_are_quoted() -> None:
    for text in ("yes", "on", "1", "0x1", "null", "1e3", "", "a: b"):
        assert parse_yaml(replaced("a: x\n", 0, {"a": text, text: "b"}))[0].data == {"a": text, text: "b"}


def test_a_change_through_aliases_and_merges_is_written_out() -> None:
    text = "a: &x {b: 1}\nc: {<<: *x, d: 2}\ne: *x\n---\nkept: yes # as it is\n"
    result = replaced(text, 0, {"a": {"b": 2}, "c": {"d": 2}, "e": {"b": 1}})
    assert parse_yaml(result)[0].data == {"a": {"b": 2}, "c": {"d": 2}, "e": {"b": 1}}
    assert result.endswith("---\nkept: yes # as it is\n")


def test_line_ends_stay_those_of_the_file() -> None:
    text = "a: 1\r\nb: 2 # two\r\n---\r\nc: 3\r\n"
    assert (
        replaced(text, 0, {"a": 7, "b": 2, "d": [1]}) == "a: 7\r\nb: 2 # two\r\nd:\r\n- 1\r\n---\r\nc: 3\r\n"
    )


ODD = """\
metadata:   {name:   shop,  labels: { team : blue,tier: [ 1,2 ] } }
spec:
   # above
   first:   one   # beside
   # between
   second:
   - a:    1
     b: 2   # of b
   -   c: "3"
   # after the list
   third: 'it''s'
   empty:
last:
- x
"""


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        ({"spec": {"first": "two"}}, "one   #", "two   #"),
        ({"spec": {"first": 7}}, "one   #", "7   #"),
        ({"spec": {"first": "yes"}}, "one   #", '"yes"   #'),
        ({"spec": {"first": None}}, "   first:   one   # beside\n", ""),
        ({"spec": {"third": "isn't"}}, "'it''s'", "'isn''t'"),
        ({"spec": {"third": None}}, "   third: 'it''s'\n", ""),
        ({"spec": {"second": None}}, "   second:\n   - a:    1\n     b: 2   # of b\n   -   c: \"3\"\n", ""),
        ({"spec": {"empty": "full"}}, "empty:\n", "empty: full\n"),
        ({"spec": {"new": {"deep": [1, "x"]}}}, "empty:\n", "empty:\n   new:\n     deep:\n     - 1\n     - x\n"),
        ({"metadata": {"labels": {"team": "red"}}}, "{ team : blue,", "{ team : red,"),
        ({"metadata": {"labels": {"team": "a,b"}}}, "{ team : blue,", '{ team : "a,b",'),
        ({"metadata": {"labels": {"new": "x"}}},
         "{ team : blue,tier: [ 1,2 ] }", '{"team": "blue", "tier": [1, 2], "new": "x"}'),
        ({"metadata": {"labels": {"team": None}}}, "{ team : blue,tier: [ 1,2 ] }", '{"tier": [1, 2]}'),
        ({"last": ["x", "y", {"z": 1}]}, "- x\n", "- x\n- y\n- z: 1\n"),
        ({"last": ["w"]}, "- x\n", "- w\n"),
        ({"more": 1}, "- x\n", "- x\nmore: 1\n"),
    ],
)  # fmt: skip
def test_only_the_characters_that_must_change(change: dict[str, Any], before: str, after: str) -> None:
    data = merge_patch(parse_yaml(ODD)[0].data, change)
    assert ODD.count(before) == 1
    assert replaced(ODD, 0, data) == ODD.replace(before, after)


def test_removing_keeps_the_head_of_the_file_and_the_rest() -> None:
    assert removed(COMMENTED, 0) == "# The shop's file.\n" + COMMENTED[COMMENTED.index("---  # the pod") :]
    assert removed(COMMENTED, 2) == COMMENTED[: COMMENTED.index("---\nlast")]


def test_removing_the_last_document_leaves_nothing() -> None:
    assert removed("# head\na: 1\n---\n# nothing here\n", 0) == ""


def test_removing_keeps_a_document_that_cannot_be_parsed() -> None:
    assert removed("a: 1\n---\nb: [\n", 0) == "---\nb: [\n"
    assert removed("b: [\n---\na: 1\n", 1) == "b: [\n"


def test_removing_before_a_directive_ends_the_document_before() -> None:
    text = "a: 1\n---\nb: 2\n...\n%YAML 1.1\n---\nc: 3\n"
    result = removed(text, 1)
    assert [document.data for document in parse_yaml(result)] == [{"a": 1}, {"c": 3}]


def test_json_files_keep_their_indentation_and_neighbours() -> None:
    text = '{"a": 1}\n{\n    "b": 2\n}\n'
    assert replaced(text, 1, {"b": 3}, is_json=True) == '{"a": 1}\n{\n    "b": 3\n}\n'
    assert replaced(text, 0, {"a": [1]}, is_json=True) == '{"a": [1]}\n{\n    "b": 2\n}\n'
    assert removed(text, 0, is_json=True) == '\n{\n    "b": 2\n}\n'


words = st.text(st.sampled_from("abyesnoul01.:-# é'\"\\\n"), max_size=8)
keys = st.text(st.sampled_from("abyno01.-/"), min_size=1, max_size=5)
values = st.recursive(
    st.booleans() | st.integers(-99, 99) | words | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=10,
)
mappings = st.dictionaries(keys, values, min_size=1, max_size=4)


@st.composite
def written(draw: st.DrawFn) -> tuple[str, Any]:
    """The text of one document, without a marker before it, in one of the ways people and programs write."""
    data = draw(mappings)
    style = draw(st.sampled_from(["block", "flow", "json", "indented", "quoted"]))
    match style:
        case "flow":
            text = yaml.safe_dump(data, default_flow_style=True, allow_unicode=True)
        case "json":
            text = json.dumps(data, indent=draw(st.sampled_from([None, 2]))) + "\n"
        case "indented":
            text = yaml.safe_dump(data, indent=4, allow_unicode=True)
        case "quoted":
            text = yaml.safe_dump(data, default_style='"')
        case _:
            text = yaml.safe_dump(data, sort_keys=False)
    comment = draw(st.sampled_from(["", "# about it\n", "\n", "# a\n\n# --- b\n"]))
    end = draw(st.sampled_from(["", "# after\n", "\n\n", "...\n", "# x\n...\n# y\n"]))
    return comment + text + end, data


@st.composite
def file_texts(draw: st.DrawFn) -> str:
    documents = draw(st.lists(written(), min_size=1, max_size=4))
    text = draw(st.sampled_from(["", "---\n", "# head\n---\n", "%YAML 1.1\n---\n"]))
    markers = st.sampled_from(["---\n", "--- # marker\n", "---\n# nothing\n---\n"])
    for index, (document, _) in enumerate(documents):
        text += (draw(markers) if index else "") + document
    return text.removesuffix("\n") if draw(st.booleans()) else text


def others(text: str, index: int) -> list[tuple[str, Any]]:
    """The other documents: the text from each marker to the last line before the next one, and what it means."""
    return [
        (text[document.start : document.end].rstrip("\n"), document.data)
        for place, document in enumerate(parse_yaml(text))
        if place != index
    ]


@settings(max_examples=300, deadline=None)
@given(st.data(), file_texts(), mappings)
def test_replacing_one_document_changes_no_other(data: st.DataObject, text: str, new: dict[str, Any]) -> None:
    documents = parse_yaml(text)
    index = data.draw(
        st.sampled_from([i for i, document in enumerate(documents) if document.data is not None])
    )
    result = replaced(text, index, new)
    assert others(result, index) == others(text, index)
    after = parse_yaml(result)
    assert json.dumps(after[index].data, sort_keys=True) == json.dumps(new, sort_keys=True)
    assert result[: after[index].start] == text[: documents[index].start]
    assert result[after[index].end :] == text[documents[index].end :]


@settings(max_examples=300, deadline=None)
@given(st.data(), file_texts())
def test_small_changes_keep_every_comment(data: st.DataObject, text: str) -> None:
    documents = parse_yaml(text)
    index = data.draw(
        st.sampled_from([i for i, document in enumerate(documents) if document.data is not None])
    )
    new = {**documents[index].data, "added": "x"}
    result = replaced(text, index, new)
    assert others(result, index) == others(text, index)
    for comment in ("# head", "# about it", "# after", "# marker", "# nothing", "# x", "# y"):
        assert result.count(comment) >= text.count(comment)


@settings(max_examples=200, deadline=None)
@given(st.data(), file_texts())
def test_removing_one_document_changes_no_other(data: st.DataObject, text: str) -> None:
    documents = parse_yaml(text)
    index = data.draw(
        st.sampled_from([i for i, document in enumerate(documents) if document.data is not None])
    )
    result = removed(text, index)
    left = [document for place, document in enumerate(documents) if place != index]
    if all(document.data is None for document in left):
        assert result == ""
        return
    assert [document.data for document in parse_yaml(result)] == [document.data for document in left]
    for document in left:
        assert text[document.start : document.end].rstrip("\n") in result
