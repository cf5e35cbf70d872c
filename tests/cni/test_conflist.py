"""The runtime's network configuration as text."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni import conflist
from cni.conflist import ConflistError

OURS = conflist.entry(socket="/run/agent.sock", exempt=["kube-system", "istio-system"])

CALICO = """{
  "name": "k8s-pod-network",
  "cniVersion": "0.3.1",
  "plugins": [
    {
      "type": "calico",
      "note": "a ] in a string, and a }",
      "ipam": {"type": "calico-ipam"}
    },
    {"type": "bandwidth", "capabilities": {"bandwidth": true}}
  ],
  "disableCheck": false
}
"""


def test_the_entry_goes_to_the_end_and_nothing_else_changes() -> None:
    text = conflist.inserted(CALICO, OURS)
    assert json.loads(text)["plugins"][2] == OURS
    assert text.replace(f",\n    {json.dumps(OURS)}", "", 1) == CALICO
    assert conflist.inserted(text, OURS) == text
    assert conflist.removed(text) == CALICO
    assert conflist.contains(text)
    assert not conflist.contains(CALICO)


@pytest.mark.parametrize(
    "text",
    [
        '{"plugins":[{"type":"a"}]}',
        '{"plugins":[ {"type":"a"} ,\n\t{"type":"b"}\n]\n}',
        '\n{ "plugins" : [\n{"type":"a"}]}',
    ],
)
def test_whatever_the_layout(text: str) -> None:
    added = conflist.inserted(text, OURS)
    assert json.loads(added)["plugins"][-1] == OURS
    assert conflist.removed(added) == text


def test_an_old_entry_is_replaced_and_a_second_one_removed() -> None:
    old = conflist.entry(socket="/old", exempt=[])
    text = conflist.inserted(CALICO, old)
    assert conflist.inserted(text, OURS) == conflist.inserted(CALICO, OURS)
    twice = text.replace('{"type": "bandwidth"', f'{json.dumps(OURS)}, {{"type": "bandwidth"')
    assert json.loads(conflist.inserted(twice, OURS))["plugins"] == [*json.loads(CALICO)["plugins"], OURS]


def test_an_entry_that_others_have_followed_stays_where_it_is() -> None:
    text = conflist.inserted(CALICO, OURS)
    longer = text.replace("\n  ],", ',\n    {"type": "later"}\n  ],')
    assert conflist.inserted(longer, OURS) == longer
    assert json.loads(conflist.removed(longer))["plugins"][-1] == {"type": "later"}


def test_an_entry_that_is_first_moves_to_the_end() -> None:
    text = f'{{"plugins":[{json.dumps(OURS)},{{"type":"a"}}]}}'
    assert json.loads(conflist.inserted(text, OURS))["plugins"] == [{"type": "a"}, OURS]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ('{"plugins":[{"type":"a"}],}', "not JSON"),
        ("[" * 100_000, "(not JSON|too deeply)"),
        ("[]", "no JSON object"),
        ("{}", "no list plugins; correct it"),
        ('{"type":"a"}', "name the file .conf"),
        ('{"plugins":{}}', "no list plugins"),
        ('{"plugins":[]}', "is empty"),
    ],
)
def test_what_is_no_list_is_told(text: str, told: str) -> None:
    with pytest.raises(ConflistError, match=told):
        conflist.inserted(text, OURS)


def test_a_list_of_our_entry_alone_cannot_be_repaired() -> None:
    with pytest.raises(ConflistError, match="no other plugin"):
        conflist.inserted(json.dumps({"plugins": [OURS]}), OURS)


def test_of_two_lists_the_last_counts() -> None:
    text = '{"plugins":[{"type":"a"}],"plugins":[{"type":"b"}]}'
    added = conflist.inserted(text, OURS)
    assert json.loads(added)["plugins"] == [{"type": "b"}, OURS]
    assert conflist.removed(added) == text


def test_a_single_plugin_becomes_a_list() -> None:
    text = conflist.from_single('{"cniVersion":"0.4.0","name":"mine","type":"bridge","mtu":1400}', OURS)
    assert json.loads(text) == {
        "cniVersion": "0.4.0",
        "name": "mine",
        "plugins": [{"type": "bridge", "mtu": 1400}, OURS],
    }
    with pytest.raises(ConflistError, match=r"name the file \.conflist"):
        conflist.from_single(CALICO, OURS)


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (["10-b.conflist", "05-a.conf", "99-x.conflist"], "05-a.conf"),
        (["README", ".10-b.conflist.ambient-tmp", "10-b.conf.before-ambient", "20-c.json"], "20-c.json"),
        (["10-a.conf", "10-a.conflist"], "10-a.conf"),
        (["calico-kubeconfig"], None),
        ([], None),
    ],
)
def test_the_first_by_name_is_the_runtimes(names: list[str], first: str | None) -> None:
    assert conflist.primary(names) == first


PLUGINS = st.lists(
    st.dictionaries(
        st.text(max_size=5), st.text() | st.integers() | st.lists(st.text(max_size=3)), max_size=3
    ).map(lambda more: {**more, "type": "x"}),
    min_size=1,
    max_size=4,
)


@given(
    PLUGINS,
    st.dictionaries(st.text(max_size=5), st.text(max_size=5)),
    st.sampled_from([None, 0, 1, 4]),
    st.booleans(),
)
def test_in_and_out_is_as_before(
    plugins: list[dict[str, Any]], others: dict[str, str], indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps({**others, "plugins": plugins}, indent=indent, ensure_ascii=ascii_only)
    added = conflist.inserted(text, OURS)
    assert json.loads(added) == {**others, "plugins": [*plugins, OURS]}
    assert conflist.inserted(added, OURS) == added
    assert conflist.removed(added) == text
