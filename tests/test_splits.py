import json

import pytest

from fsefs_nnunet.cases.splits import extended, load_splits, make_splits, query_cases, save_splits, support_cases
from fsefs_nnunet.errors import InputError

LABELLED = [f"case_{i:03d}" for i in range(30)]
UNLABELLED = [f"scan_{i}" for i in range(4)]


@pytest.fixture
def splits():
    return make_splits(LABELLED, UNLABELLED, [1, 5, 10], num_queries=15)


def test_queries_and_pool_part_the_labelled_cases(splits):
    assert len(splits["queries"]) == 15
    assert splits["queries"] == sorted(splits["queries"])
    assert splits["unlabelled_queries"] == UNLABELLED
    for fold in splits["folds"]:
        assert sorted([*fold, *splits["queries"]]) == LABELLED


def test_supports_are_nested_and_never_queries(splits):
    for fold in range(5):
        one, five, ten = (support_cases(splits, shots, fold) for shots in (1, 5, 10))
        assert [len(one), len(five), len(ten)] == [1, 5, 10]
        assert one == five[:1] and five == ten[:5]
        assert sorted(support_cases(splits, "all", fold)) == sorted(splits["folds"][fold])
        assert query_cases(splits, fold) == (splits["queries"], UNLABELLED)
        assert not set(support_cases(splits, "all", fold)) & set(splits["queries"])


def test_folds_differ(splits):
    assert len({tuple(fold) for fold in splits["folds"]}) == 5
    assert len({support_cases(splits, 1, fold)[0] for fold in range(5)}) > 1


def test_order_of_the_cases_does_not_matter_and_the_seed_does(splits):
    again = make_splits(LABELLED[::-1], UNLABELLED[::-1], [10, 1, 5], num_queries=15)
    assert again == splits
    other = make_splits(LABELLED, UNLABELLED, [1, 5, 10], num_queries=15, seed=1)
    assert other["queries"] != splits["queries"] and other["folds"] != splits["folds"]


def test_more_folds_keep_the_first_ones(splits):
    more = make_splits(LABELLED, UNLABELLED, [1, 5, 10], num_queries=15, num_folds=7)
    assert more["folds"][:5] == splits["folds"] and more["num_folds"] == len(more["folds"]) == 7


def test_extended_draws_are_those_of_a_single_call(splits):
    assert extended(splits, 7, UNLABELLED) == make_splits(LABELLED, UNLABELLED, [15], num_queries=15, num_folds=7)
    assert extended(splits, 2, ["other"]) == {
        **splits,
        "num_folds": 2,
        "unlabelled_queries": ["other"],
        "folds": splits["folds"][:2],
    }


def test_extending_keeps_what_was_edited_by_hand(splits):
    pool, queries = splits["folds"][0], splits["queries"]
    edited = {**splits, "queries": sorted([*queries, pool[0]]), "folds": [pool[1:], pool[:0:-1]], "num_folds": 2}
    more = extended(edited, 4, UNLABELLED)
    assert more["queries"] == edited["queries"] and more["folds"][:2] == edited["folds"]
    assert all(sorted(fold) == sorted(pool[1:]) for fold in more["folds"]) and more["num_folds"] == 4
    assert len({tuple(fold) for fold in more["folds"]}) == 4


@pytest.mark.parametrize("labelled, shots, expected", [(10, 10, 0), (11, 10, 1), (25, 5, 20), (40, 10, 20), (1, 1, 0)])
def test_number_of_queries(labelled, shots, expected):
    splits = make_splits([f"c{i}" for i in range(labelled)], [], [shots])
    assert len(splits["queries"]) == expected
    assert len(splits["folds"][0]) == labelled - expected


def test_fold_all_takes_every_labelled_case(splits):
    for shots in (1, 5, "all", 1000):
        assert support_cases(splits, shots, "all") == LABELLED
    assert query_cases(splits, "all") == ([], UNLABELLED)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["a", "a"], [], [1]), "'a'"),
        ((["a", "b"], ["b"], [1]), "'b'"),
        ((["a", "b"], [], [1, 3]), "3 shots .* there are 2"),
        ((["a", "b"], [], [0]), r"\[0\]"),
        ((["a", "b"], [], []), r"\[\]"),
        ((["a", "b"], [], [1], -1), "-1 queries"),
        ((["a", "b"], [], [1], 1, 0), "0 folds"),
    ],
)
def test_make_splits_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_splits(*arguments)


@pytest.mark.parametrize("fold", [5, -1, "0"])
def test_unknown_fold(splits, fold):
    for ask in (lambda: support_cases(splits, 1, fold), lambda: query_cases(splits, fold)):
        with pytest.raises(ValueError, match="there are 5 folds.*fseft splits -d ID --folds N"):
            ask()


@pytest.mark.parametrize("shots", [16, 0, -1, "many"])
def test_shots_outside_the_pool(splits, shots):
    with pytest.raises(ValueError, match="pool of 15 cases"):
        support_cases(splits, shots, 0)


def test_what_is_returned_is_a_copy(splits):
    support_cases(splits, "all", 0).clear()
    query_cases(splits, 0)[0].clear()
    assert len(splits["folds"][0]) == len(splits["queries"]) == 15


def test_round_trip_replaces_the_old_file_and_leaves_nothing_else(splits, tmp_path):
    file = tmp_path / "splits_fseft.json"
    file.write_text("old")
    save_splits(splits, file)
    assert load_splits(file) == splits
    assert [f.name for f in tmp_path.iterdir()] == ["splits_fseft.json"]


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="splits_fseft.json.*fseft splits -d ID"):
        load_splits(tmp_path / "splits_fseft.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda s: [s],  # nnU-Net's splits_final.json is a list
        lambda s: {k: v for k, v in s.items() if k != "queries"},
        lambda s: {**s, "num_folds": 3},
        lambda s: {**s, "folds": [], "num_folds": 0},
        lambda s: {**s, "folds": [*s["folds"][:4], s["folds"][4][1:]]},
        lambda s: {**s, "folds": [[]] * 5},
        lambda s: {**s, "queries": [*s["queries"], s["folds"][0][0]]},
        lambda s: {**s, "unlabelled_queries": s["queries"][:1]},
        lambda s: {**s, "queries": "case_000"},
    ],
)
def test_damaged_content(splits, tmp_path, change):
    file = tmp_path / "splits_fseft.json"
    file.write_text(json.dumps(change(splits)))
    with pytest.raises(ValueError, match="splits_fseft.json.*fseft splits -d ID"):
        load_splits(file)


def test_cut_file(splits, tmp_path):
    file = tmp_path / "splits_fseft.json"
    file.write_text(json.dumps(splits)[:-10])
    with pytest.raises(ValueError, match="splits_fseft.json.*not JSON"):
        load_splits(file)
