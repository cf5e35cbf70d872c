"""A look at a whole tree goes in steps: what happens between them is neither lost nor taken twice."""

from pathlib import Path

from tests.store.manifests import pod
from ztunnel.store.directory import DirectoryStore
from ztunnel.store.models import Pod


def test_a_file_that_comes_while_the_tree_is_looked_at_stays(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(pod("a"))
    index = DirectoryStore(tmp_path).index
    steps = index.looking(0.0)
    next(steps)  # the directory's entries are being read
    entries = sum(1 for _ in tmp_path.iterdir())
    late = tmp_path / "b.yaml"
    late.write_text(pod("b"))
    index.refresh_file(late)
    for _ in steps:
        pass
    assert entries == 1
    assert {key.name for key in index.of_kind(Pod)} == {"a", "b"}
    index.refresh()
    assert {key.name for key in index.of_kind(Pod)} == {"a", "b"}


def test_a_file_that_goes_while_the_tree_is_looked_at_is_gone(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text(pod(name))
    index = DirectoryStore(tmp_path).index
    index.refresh()
    steps = index.looking(0.0)
    next(steps)
    (tmp_path / "b.yaml").unlink()
    index.refresh_file(tmp_path / "b.yaml")
    for _ in steps:
        pass
    assert {key.name for key in index.of_kind(Pod)} == {"a"}


def test_a_file_that_is_being_written_rests_first(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(pod("a", image="one"))
    index = DirectoryStore(tmp_path).index
    index.refresh()
    path.write_text(pod("a", image="two"))
    assert index.refresh_rested({path}, 60.0) == {path}
    assert index.refresh_rested({path}, 0.0) == set()
    (found,) = index.of_kind(Pod).values()
    assert isinstance(found, Pod)
    assert found.spec.containers[0].image == "two"


def test_nothing_of_a_large_tree_is_missed(tmp_path: Path) -> None:
    for number in range(450):  # more than a step
        (tmp_path / f"{number:03}.yaml").write_text(pod(f"p-{number:03}"))
    index = DirectoryStore(tmp_path).index
    steps = sum(1 for _ in index.looking(0.0))
    assert steps == 3
    assert len(index.of_kind(Pod)) == 450
