import pytest

from fsefs_nnunet.labels import (
    BTCV_14,
    STRUCTURES,
    TEMPLATE_29,
    TEMPLATE_32,
    foreground_names,
    match_labels,
    normalised,
)

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


# ---- the table ----


def test_templates_are_of_structures_of_the_table():
    assert (len(TEMPLATE_29), len(TEMPLATE_32), len(BTCV_14)) == (29, 32, 14)
    for template in (TEMPLATE_29, TEMPLATE_32, BTCV_14[1:]):
        assert len(set(template)) == len(template) and set(template) <= STRUCTURES.keys()
        assert all(normalised(name) == name for name in template)


def test_every_spelling_means_one_structure():
    spellings = [spelling for name, aliases in STRUCTURES.items() for spelling in (name, *aliases)]
    assert len(set(spellings)) == len(spellings)


# rows of the universal heads as their publishers spell them
FSEFT = (
    "spleen rkidney lkidney gall esophagus liver stomach aorta postcava psv pancreas radrenal ladrenal duodenum bladder"
)
FSEFT += (
    " prost_ut liver_tumor kidney_tumor kidney_cyst celiac_truck rlung llung bone brain lung_tumor pancreas_tumor hv"
)
FSEFT += " hvt colon_tumor"
CLIP_DRIVEN = """
    Spleen, Right Kidney, Left Kidney, Gall Bladder, Esophagus, Liver, Stomach, Aorta, Postcava, Portal Vein and
    Splenic Vein, Pancreas, Right Adrenal Gland, Left Adrenal Gland, Duodenum, Hepatic Vessel, Right Lung, Left
    Lung, Colon, Intestine, Rectum, Bladder, Prostate, Left Head of Femur, Right Head of Femur, Celiac Truck,
    Kidney Tumor, Liver Tumor, Pancreas Tumor, Hepatic Vessel Tumor, Lung Tumor, Colon Tumor, Kidney Cyst
""".split(",")
AMOS = ["spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "arota", "postcava"]
AMOS += ["pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus"]
FLARE = [
    "Liver",
    "Right kidney",
    "Spleen",
    "Pancreas",
    "Aorta",
    "IVC",
    "RAG",
    "LAG",
    "Gallbladder",
    "Esophagus",
    "Stomach",
]
FLARE += ["Duodenum", "Left kidney"]
TOTALSEGMENTATOR = [
    "spleen",
    "kidney_right",
    "kidney_left",
    "gallbladder",
    "liver",
    "stomach",
    "aorta",
    "urinary_bladder",
]
TOTALSEGMENTATOR += [
    "inferior_vena_cava",
    "portal_vein_and_splenic_vein",
    "pancreas",
    "adrenal_gland_right",
    "duodenum",
]
TOTALSEGMENTATOR += ["adrenal_gland_left", "esophagus"]


def test_published_spellings_in_their_order():
    assert tuple(map(normalised, FSEFT.split())) == TEMPLATE_29
    assert tuple(map(normalised, CLIP_DRIVEN)) == TEMPLATE_32


@pytest.mark.parametrize("names", [AMOS, FLARE, TOTALSEGMENTATOR])
def test_datasets_are_known_to_the_29_classes(names):
    assert match_labels(names, TEMPLATE_29).keys() == set(names)


def test_what_only_looks_alike():
    strangers = ["lung_upper_lobe_left", "femur_left", "vertebrae_L3", "LAD", "prostate", "small_bowel", "kidney"]
    assert match_labels(strangers, TEMPLATE_29) == {}
