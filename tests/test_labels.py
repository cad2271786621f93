import pytest

from fsefs_nnunet.labels import foreground_names, match_labels, normalised

CLASSES = ("liver", "kidneys", "kidney_right", "inferior_vena_cava", "gallbladder", "spleen")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("Liver", "liver"),
        ("kidney_right", "kidney_right"),
        ("Right Kidney", "kidney_right"),
        ("right-kidney", "kidney_right"),
        ("LKidney", "kidney_left"),
        (" IVC ", "inferior_vena_cava"),
        ("postcava", "inferior_vena_cava"),
        ("gall bladder", "gallbladder"),
        ("Oesophagus", "esophagus"),
        ("kidney", "kidneys"),
        ("liver tumour (2)", "liver_tumour_2"),
    ],
)
def test_spellings(name, expected):
    assert normalised(name) == expected


def test_matches():
    names = ["Spleen", "stomach", "Kidney (R)", "postcava"]
    assert match_labels(names, CLASSES) == {
        "Spleen": "spleen",
        "Kidney (R)": "kidney_right",
        "postcava": "inferior_vena_cava",
    }


def test_parts_and_neighbours_do_not_match():
    assert match_labels(["liver_tumour", "kidney_left", "stomach", "accessory spleen"], CLASSES) == {}


def test_nothing_matches_nothing():
    assert match_labels([], CLASSES) == {} == match_labels(["liver"], ())


def test_two_labels_of_one_structure():
    with pytest.raises(ValueError, match="Two labels match the backbone's class 'kidney_right': rename"):
        match_labels(["kidney_right", "Right Kidney"], CLASSES)


def test_two_classes_of_one_structure():
    with pytest.raises(ValueError, match=r"'ivc' matches the backbone's classes \['postcava', 'IVC'\]: rename"):
        match_labels(["ivc"], ("postcava", "IVC"))


def test_foreground_names_follow_the_networks_outputs():
    labels = {"stomach": 3, "background": 0, "liver": 1, "ignore": 4, "spleen": 2}
    assert foreground_names(labels, has_regions=False) == ["liver", "spleen", "stomach"]
    regions = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "rim": 1, "ignore": 4}
    assert foreground_names(regions, has_regions=True) == ["whole", "core", "rim"]
