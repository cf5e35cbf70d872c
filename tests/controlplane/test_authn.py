"""Bearer tokens to callers."""

from pathlib import Path

import pytest

from ztunnel.controlplane.authn import Caller, TokenDirectory, UnauthenticatedError, authenticate


def proxy_of(node: str) -> Caller:
    return Caller(node, "istio-system", "ztunnel")


@pytest.fixture
def tokens(tmp_path: Path) -> TokenDirectory:
    (tmp_path / "node-1").write_text("one\n")
    (tmp_path / "node-2").write_text("two")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / ".node-3.tmp").write_text("three")
    return TokenDirectory(tmp_path)


@pytest.mark.parametrize("value", ["Bearer one", "bearer one", "Bearer  one "])
async def test_the_file_that_holds_the_token_names_the_node(tokens: TokenDirectory, value: str) -> None:
    assert await authenticate(tokens, {"authorization": value}) == proxy_of("node-1")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "no token"),
        ({}, "no token"),
        ({"authorization": ""}, "no token"),
        ({"authorization": "one"}, "Bearer TOKEN"),
        ({"authorization": "Basic one"}, "Bearer TOKEN"),
        ({"authorization": "Bearer"}, "Bearer TOKEN"),
        ({"authorization": "Bearer zero"}, "not that of a node"),
        ({"authorization": "Bearer on"}, "not that of a node"),
        ({"authorization": "Bearer three"}, "not that of a node"),
        ({"authorization": "Bearer ünicode"}, "not that of a node"),
        ({"authorization": "Bearer " + "x" * 20_000}, "longer than"),
    ],
)
async def test_refusals_say_why_and_never_the_token(
    tokens: TokenDirectory, metadata: dict[str, object] | None, message: str
) -> None:
    with pytest.raises(UnauthenticatedError, match=message) as refused:
        await authenticate(tokens, metadata)
    assert "zero" not in str(refused.value)


async def test_files_are_read_again_when_they_change(tokens: TokenDirectory, tmp_path: Path) -> None:
    assert await tokens.authenticate("one") == proxy_of("node-1")
    (tmp_path / "node-1").write_text("uno")
    (tmp_path / "node-4").write_text("four")
    assert await tokens.authenticate("uno") == proxy_of("node-1")
    assert await tokens.authenticate("four") == proxy_of("node-4")
    (tmp_path / "node-4").unlink()
    for gone in ("one", "four"):
        with pytest.raises(UnauthenticatedError):
            await tokens.authenticate(gone)


async def test_a_token_of_two_nodes_is_nobodys(tokens: TokenDirectory, tmp_path: Path) -> None:
    (tmp_path / "node-2").write_text("one")
    with pytest.raises(UnauthenticatedError, match="several nodes"):
        await tokens.authenticate("one")


async def test_without_the_directory_nobody_is_known(tmp_path: Path) -> None:
    with pytest.raises(UnauthenticatedError, match="cannot be read"):
        await TokenDirectory(tmp_path / "none").authenticate("one")
