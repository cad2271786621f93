"""`fseft splits` on a dataset: which cases become support and queries, and what of earlier draws stays."""

import pytest
from trainings import edit

from fsefs_nnunet.cases.splits import load_splits
from fsefs_nnunet.nnunet import drawing


def drawn(workspace) -> dict:
    return load_splits(workspace.preprocessed / "splits_fseft.json")


def test_splits_of_the_tiny_dataset(tiny):
    splits = drawn(tiny)
    assert len(splits["queries"]) == 3 and splits["unlabelled_queries"] == ["scan_0", "scan_1"]
    assert [len(fold) for fold in splits["folds"]] == [5] * 5
    assert not (tiny.preprocessed / "splits_final.json").exists()


def test_a_users_splits_are_not_touched(workspace):
    file = workspace.preprocessed / "splits_final.json"
    file.write_text("mine")
    drawing.write_splits(77, [2], str(workspace.queries), 3, 2, 1)
    assert file.read_text() == "mine"
    splits = drawn(workspace)
    assert len(splits["queries"]) == 3 and len(splits["folds"]) == 2


def test_images_ts_are_the_queries_when_every_labelled_case_is_support(workspace, capsys):
    (workspace.queries).rename(workspace.raw / "imagesTs")
    assert list(drawing.write_splits(77, [8], None, 20, 5, 1)) == ["scan_0", "scan_1"]
    assert drawn(workspace)["queries"] == []
    assert "imagesTs are the queries" in capsys.readouterr().out
    assert drawing.write_splits(77, [5], None, 20, 5, 1) == {}  # three labelled ones are left


def test_other_draws_are_announced(workspace, capsys):
    draw = (77, [], str(workspace.queries), 20, 5)
    drawing.write_splits(*draw, 12345)
    assert "replaced by other draws" not in capsys.readouterr().out
    drawing.write_splits(*draw, 1)
    assert "results of earlier K-shot trainings no longer belong to it" in capsys.readouterr().out


def test_what_was_drawn_before_stays(workspace, capsys):
    """The tiny dataset: a pool of five, three labelled queries, two unlabelled ones."""
    before = drawn(workspace)
    drawing.write_splits(77, [3], None, num_folds=7)
    after = drawn(workspace)
    assert after == {**before, "num_folds": 7, "folds": after["folds"]} and after["folds"][:5] == before["folds"]
    drawing.write_splits(77, [], None)
    assert drawn(workspace) == after
    drawing.write_splits(77, [], None, num_folds=2)
    assert drawn(workspace)["folds"] == before["folds"][:2]
    assert "replaced by other draws" not in capsys.readouterr().out


@pytest.mark.parametrize("change", ["shots", "num_queries", "seed", "case"])
def test_what_draws_anew(workspace, capsys, change):
    before = drawn(workspace)
    if change == "case":
        for folder, end in (("imagesTr", "_0000"), ("labelsTr", "")):
            (workspace.raw / folder / f"case_7{end}.nii.gz").unlink()
        edit(workspace.raw / "dataset.json", lambda content: content.update(numTraining=7))
    arguments = {"num_queries": 2} if change == "num_queries" else {"seed": 7} if change == "seed" else {}
    drawing.write_splits(77, [6] if change == "shots" else [5], None, **arguments)
    after = drawn(workspace)
    assert "replaced by other draws" in capsys.readouterr().out
    assert len(after["queries"]) == (3 if change == "seed" else 2)
    assert after["queries"] != before["queries"] and after["unlabelled_queries"] == []


@pytest.mark.parametrize("shots, queries", [(["all"], 4), ([1, "all"], 4), ([5, "all"], 3), ([1], 7)])
def test_all_shots_are_at_least_half_of_the_cases(workspace, shots, queries):
    (workspace.preprocessed / "splits_fseft.json").unlink()
    drawing.write_splits(77, shots, None)
    assert len(drawn(workspace)["queries"]) == queries


def test_damaged_splits_are_drawn_anew(workspace):
    (workspace.preprocessed / "splits_fseft.json").write_text("{")
    drawing.write_splits(77, [5], None)
    assert len(drawn(workspace)["queries"]) == 3
