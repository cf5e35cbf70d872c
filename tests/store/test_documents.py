"""Files fall into documents where YAML says so, and one bad document does not hide the others."""

import itertools
import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ztunnel.store.documents import Document, dump, line_of, means_string, parse_json, parse_yaml


def pieces(text: str) -> list[str]:
    return [text[document.start : document.end] for document in parse_yaml(text)]


def data(text: str) -> list[object]:
    return [document.data for document in parse_yaml(text)]


def only(text: str) -> Document:
    (document,) = parse_yaml(text)
    return document


def test_documents_reach_from_marker_to_marker() -> None:
    text = "# file\na: 1\n# of a\n--- # of b\n\nb: 2\n...\n# between\n%YAML 1.1\n---\nc: 3\n---\n---\n# end\n"
    assert pieces(text) == [
        "a: 1\n# of a\n",
        "--- # of b\n\nb: 2\n...\n# between\n",
        "%YAML 1.1\n---\nc: 3\n",
        "---\n",
        "---\n# end\n",
    ]
    assert data(text) == [{"a": 1}, {"b": 2}, {"c": 3}, None, None]


@pytest.mark.parametrize(
    "text",
    [
        "a: |\n  ---\n  text\n---\nb: 2\n",
        'a: "x --- y"\n---\nb: 2\n',
        "a: ---\n---\nb: 2\n",
        "# --- not a marker\na: x\n---\nb: 2",
        "a: é€𝄞\n---\nb: 2\n",
        "a: x\r\n---\r\nb: 2\r\n",
        "  a: x\n---\n  b: 2\n",
    ],
)
def test_what_looks_like_a_marker_is_told_from_one(text: str) -> None:
    assert len(parse_yaml(text)) == 2
    assert data(text)[1] == {"b": 2}
    assert "".join(pieces(text)) == text[text.index("a:") if text.startswith("#") else 0 :]


@pytest.mark.parametrize(
    "bad",
    ["a: [1\n", "a: 1\n b: 2\n", 'a: "x\n', "a: @x\n", "\ta: 1\n", "a: *missing\n", "a: 1\na: 2\n", "a: 1\n}\n",
     "x: !!python/object/apply:os.getcwd []\n", "a: &a [*a]\n", "%NO 1\n%YAML 9.9\n"],
)  # fmt: skip
def test_a_bad_document_leaves_the_others(bad: str) -> None:
    text = f"first: 1\n---\n{bad}---\nlast: 1\n"
    first, middle, last = parse_yaml(text)
    assert (first.data, first.error) == ({"first": 1}, "")
    assert (last.data, last.error) == ({"last": 1}, "")
    assert middle.error.startswith("not valid YAML: ")
    assert middle.remedy
    assert middle.data is None
    assert 3 <= middle.line <= 5


def test_errors_tell_the_line_and_the_remedy() -> None:
    assert only("a: 1\nb: 2\na: 3\n")[3:] == (
        3,
        None,
        "not valid YAML: the key 'a' is there twice",
        "keep one of them",
    )
    assert only("a:\n\tb: 1\n").remedy == "indent with spaces instead of tabs"
    (first, second) = parse_yaml("a: 1\n---\nb:\n  - x\n  y: 1\n")
    assert (first.line, second.line) == (1, 5)


def test_a_small_text_that_means_a_huge_tree_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "too large" in only("\n".join(lines)).error
    assert "too deep" in only("a: " + "[" * 500 + "]" * 500).error


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2024-01-01T00:00:00Z", "2024-01-01T00:00:00Z"),
        ("2024-01-01", "2024-01-01"),
        ("12:30:45", "12:30:45"),
        ("0x1F", 31),
        ("010", 8),
        ("08", "08"),
        ("1e3", 1000.0),
        ("1_000", 1000),
        ("0.5", 0.5),
        ("1.2.3", "1.2.3"),
        ("yes", True),
        ("off", False),
        ("~", None),
        ("null", None),
        ("", None),
        ('"yes"', "yes"),
    ],
)
def test_scalars_mean_what_they_mean_to_kubernetes(text: str, value: object) -> None:
    assert only(f"a: {text}").data == {"a": value}


def test_keys_are_texts_as_written() -> None:
    assert only("1: a\nyes: b\n~: c\n1.5: d\n").data == {"1": "a", "yes": "b", "~": "c", "1.5": "d"}
    assert "twice" in only('1: a\n"1": b\n').error


def test_merge_keys_and_aliases_work() -> None:
    assert only("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}\n").data == {
        "a": {"b": 1, "c": 2},
        "d": {"b": 1, "c": 3},
    }


def test_lines_are_found_by_path() -> None:
    text = "a: 1\n---\n# comment\nspec:\n  ports:\n  - name: x\n  - name: y\n    port: http\n"
    document = parse_yaml(text)[1]
    assert line_of(text, document, ("spec", "ports", 1, "port")) == 8
    assert line_of(text, document, ("spec", "ports", 1, "missing")) == 7
    assert line_of(text, document, ("nothing",)) == 4


def test_json_documents_follow_one_another() -> None:
    documents = parse_json('{"a": 1}\n[2]\n{"b": {"c": null}}\n')
    assert [document.data for document in documents] == [{"a": 1}, [2], {"b": {"c": None}}]
    assert [document.line for document in documents] == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"a": 1,}', "not valid JSON"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ("[" * 5000, "not valid JSON"),
        ("[" * 500 + "]" * 500, "too deep"),
    ],
)
def test_json_errors_are_told(text: str, error: str) -> None:
    good, bad = parse_json('{"x": 1}\n' + text)
    assert good.data == {"x": 1}
    assert error in bad.error
    assert bad.line == 2


@pytest.mark.parametrize(
    "text", ["yes", "1", "0x1", "null", "~", "", "a: b", "- a", "1e3", "true", "#a", " a"]
)
def test_texts_that_need_quotes_are_known(text: str) -> None:
    assert not means_string(text)


@pytest.mark.parametrize("text", ["a", "web-1", "node-1", "10.0.0.1", "12:30", "2024-01-01", "a b"])
def test_texts_that_need_no_quotes_are_known(text: str) -> None:
    assert means_string(text)


plain_data = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abcyesno01.-", min_size=1), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text("abc", min_size=1), plain_data))
def test_what_is_dumped_is_read_back(value: dict[str, object]) -> None:
    assert only(dump(value)).data == value


@given(st.text(st.sampled_from("ab:-?[]{}#&*!|>'\"%@` \n\t.~1")))
def test_any_text_falls_into_documents_that_cover_it(text: str) -> None:
    """Nothing is raised, and the pieces are in order, without gaps between them."""
    documents = parse_yaml(text)
    for before, after in itertools.pairwise(documents):
        assert before.start < before.end == after.start
    if documents:
        assert documents[-1].end == len(text)
        assert not text[: documents[0].start].strip() or "#" in text[: documents[0].start]
    if not any(document.error for document in documents):
        assert len(documents) == len(list(yaml.compose_all(text, yaml.CSafeLoader)))


@given(st.text(st.sampled_from('{}[]",:01 \nnul')))
def test_any_text_is_read_as_json_without_an_exception(text: str) -> None:
    documents = parse_json(text)
    if len(documents) == 1 and not documents[0].error:
        assert documents[0].data == json.loads(text)
