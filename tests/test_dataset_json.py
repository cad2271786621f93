"""dataset.json as people write it: what is accepted, and what each wrong line should be."""

import json
import os
import subprocess
import sys

import pytest

from fsefs_nnunet.cases.dataset_json import order_warnings, read_dataset_json, shows_ct
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.labels import foreground_names

SOUND = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1, "spleen": 2},
    "numTraining": 3,
    "file_ending": ".nii.gz",
}
REGIONS = {"background": 0, "both": [1, 2], "spleen": 2}


def read(tmp_path, **changes) -> dict:
    """None deletes a key."""
    content = {key: value for key, value in {**SOUND, **changes}.items() if value is not None}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    return read_dataset_json(tmp_path / "dataset.json")


ACCEPTED = {
    "sound": ({}, SOUND["labels"]),
    "the older name of the channels": ({"channel_names": None, "modality": {"0": "CT"}}, SOUND["labels"]),
    "no numTraining": ({"numTraining": None}, SOUND["labels"]),
    "values in quotes": ({"labels": {"liver": "1", "background": 0}}, {"liver": 1, "background": 0}),
    "values as floats": ({"labels": {"background": 0.0, "liver": 1.0}}, {"background": 0, "liver": 1}),
    "a list of one value": ({"labels": {"background": 0, "liver": [1]}}, {"background": 0, "liver": 1}),
    "regions": ({"labels": REGIONS, "regions_class_order": [1, 2]}, REGIONS),
    "an order without regions": ({"regions_class_order": [1, 2]}, SOUND["labels"]),
    "ignore label": ({"labels": {"background": 0, "a": 1, "ignore": 2}}, {"background": 0, "a": 1, "ignore": 2}),
    "a region that is painted as background": (
        {"labels": {"background": 0, "all": [1, 2], "a": 1, "b": 2}, "regions_class_order": [0, 1, 2]},
        None,
    ),
    "regions and ignore label": (
        {"labels": {**REGIONS, "ignore": 3}, "regions_class_order": [1, 2]},
        {**REGIONS, "ignore": 3},
    ),
    "odd names": ({"labels": {"background": 0, "eye[ul]l": 1, "CAC + Stent": 2}}, None),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(tmp_path, name):
    changes, labels = ACCEPTED[name]
    content = read(tmp_path, **changes)
    assert content["channel_names"] == {"0": "CT"} and content["labels"] == (labels or changes["labels"])


REFUSED = {
    "gap": (
        {"labels": {"background": 0, "a": 1, "b": 3}},
        'labels must be in consecutive order (0, 1, 2, ...), 3 do not satisfy this: write "labels": {"background": 0, '
        '"a": 1, "b": 2} and renumber the label maps.',
    ),
    "intensities": (
        {"labels": {"background": 0, "a": 100, "b": 200}},
        'in consecutive order (0, 1, 2, ...), 100, 200 do not satisfy this: write "labels": {"background": 0, "a": 1, '
        '"b": 2}',
    ),
    "gap among regions": (
        {"labels": {"background": 0, "a": [1, 3], "b": 3}, "regions_class_order": [1, 3]},
        '"a": [1, 2], "b": 2}',
    ),
    "background not 0": (
        {"labels": {"background": 1, "a": 0, "b": 2}},
        'background is 1: it must be "background": 0, in the label maps as well.',
    ),
    "no background": ({"labels": {"a": 1}}, 'labels has no background: it must be "background": 0'),
    "background alone": ({"labels": {"background": 0}}, "names nothing but background"),
    "no labels": ({"labels": None}, 'labels is missing: add "labels": {"background": 0, "NAME": 1}.'),
    "labels as numbers": ({"labels": [0, 1]}, "labels is missing: add"),
    "names and values reversed": (
        {"labels": {"0": "background", "10": "a", "2": "b"}},
        'labels has names and values swapped: write "labels": {"background": 0, "b": 2, "a": 10}.',
    ),
    "a value twice": ({"labels": {"background": 0, "a": 1, "b": 1}}, "labels 'a' and 'b' have the same value 1"),
    "a value that is none": ({"labels": {"background": 0, "a": "one"}}, "label 'a' has the value 'one'"),
    "a negative value": ({"labels": {"background": 0, "a": -1}}, "label 'a' has the value -1"),
    "true": ({"labels": {"background": 0, "a": True}}, "label 'a' has the value True"),
    "ignore in between": (
        {"labels": {"background": 0, "ignore": 1, "a": 2}},
        'the ignore label is 1, it must be the highest value: write "labels": {"background": 0, "a": 1, "ignore": 2}',
    ),
    "ignore beyond a gap": ({"labels": {"background": 0, "a": 1, "ignore": 255}}, '"a": 1, "ignore": 2}'),
    "ignore as a list": (
        {"labels": {**REGIONS, "ignore": [3, 4]}, "regions_class_order": [1, 2]},
        'ignore is [3, 4]: it must be one number, write "ignore": 3.',
    ),
    "ignore in quotes": (
        {"labels": {"background": 0, "a": 1, "ignore": "2"}},
        "ignore is '2': it must be one number, write \"ignore\": 2.",
    ),
    "labels as names alone": (
        {"labels": ["background", "a"]},
        'labels is a list: write "labels": {"background": 0, "a": 1}.',
    ),
    "a pattern for an ending": ({"file_ending": "*.nii.gz"}, 'write "file_ending": ".nii.gz".'),
    "an order, and an ignore label": (
        {"labels": {"background": 0, "inner": 1, "whole": [1, 2], "ignore": 3}},
        'write "labels": {"background": 0, "whole": [1, 2], "inner": 1, "ignore": 3}, "regions_class_order": [2, 1].',
    ),
    "a gap among regions without order": (
        {"labels": {"background": 0, "a": 2, "w": [2, 4]}},
        '"a": 1, "w": [1, 2]} and renumber the label maps.',
    ),
    "regions without order": (
        {"labels": REGIONS},
        "regions need regions_class_order: it must have one value for each of both, spleen, which a prediction writes "
        'for it. Outer regions come first: write "labels": {"background": 0, "both": [1, 2], "spleen": 2}, '
        '"regions_class_order": [1, 2].',
    ),
    "order too short": ({"labels": REGIONS, "regions_class_order": [1]}, "regions_class_order is [1]: it must have"),
    "order of names": ({"labels": REGIONS, "regions_class_order": ["a", "b"]}, "regions_class_order is ['a', 'b']"),
    "channels reversed": (
        {"channel_names": {"T1": 0, "T2": 1}},
        'channel_names has names and numbers swapped: write "channel_names": {"0": "T1", "1": "T2"}.',
    ),
    "channels as a list": ({"channel_names": ["CT"]}, 'channel_names is a list: write "channel_names": {"0": "CT"}.'),
    "channels out of order": (
        {"channel_names": {"1": "T1", "0": "T2"}},
        'is out of order, and nnU-Net relies on the order: write "channel_names": {"0": "T2", "1": "T1"}.',
    ),
    "inner region first": (
        {"labels": {"background": 0, "left": 2, "both": [1, 2]}},
        'write "labels": {"background": 0, "both": [1, 2], "left": 2}, "regions_class_order": [1, 2].',
    ),
    "an order of other values": (
        {"labels": REGIONS, "regions_class_order": [1, 7]},
        "regions_class_order has 7, which is not a value in labels",
    ),
    "background in capitals": (
        {"labels": {"Background": 0, "a": 1}},
        "nnU-Net only recognises 'background' in lower case: write \"background\": 0.",
    ),
    "background as a list": ({"labels": {"background": [0], "a": 1}}, 'background is [0]: it must be "background": 0.'),
    "half an ending": ({"file_ending": ".gz"}, 'file_ending is \'.gz\': write "file_ending": ".nii.gz".'),
    "an ending with a space": ({"file_ending": ".nii "}, 'write "file_ending": ".nii".'),
    "no channels": ({"channel_names": None}, 'channel_names is missing: add "channel_names": {"0": "CT"}'),
    "no file ending": ({"file_ending": None}, 'file_ending is missing: add "file_ending": ".nii.gz"'),
    "ending without its dot": ({"file_ending": "nii.gz"}, 'has no dot: write "file_ending": ".nii.gz".'),
    "numTraining": ({"numTraining": "many"}, "numTraining is 'many': give the number of training cases"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    changes, sentence = REFUSED[name]
    with pytest.raises(InputError) as error:
        read(tmp_path, **changes)
    assert str(error.value).startswith(f"{tmp_path}/dataset.json: ") and sentence in str(error.value)


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    with pytest.raises(InputError) as error:
        read(tmp_path, channel_names={"CT": 0}, file_ending="nii", labels={"0": "background", "1": "a"})
    assert all(part in str(error.value) for part in ('{"0": "CT"}', '".nii"', '{"background": 0, "a": 1}'))


def test_a_byte_order_mark(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps(SOUND), "utf-8-sig")
    with pytest.raises(InputError, match="starts with a byte order mark: save it as UTF-8 without"):
        read_dataset_json(tmp_path / "dataset.json")


@pytest.mark.parametrize("text", [b"{", b"[1]", b"3", "ü".encode("latin-1")])
def test_what_is_no_dataset_json(tmp_path, text):
    (tmp_path / "dataset.json").write_bytes(text)
    with pytest.raises(InputError, match=rf"^{tmp_path}/dataset\.json is not an nnU-Net dataset\.json \(.+\): repair"):
        read_dataset_json(tmp_path / "dataset.json")


def test_a_name_that_is_there_twice(tmp_path):
    """JSON would take the second one, and the first would be lost."""
    text = json.dumps({**SOUND, "labels": {"background": 0, "kidney": 1, "x": 2}}).replace('"x"', '"kidney"')
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(InputError, match="names 'kidney' twice: give each its own name"):
        read_dataset_json(tmp_path / "dataset.json")


@pytest.mark.parametrize(
    "labels, order, said",
    [
        (REGIONS, [1, 2], None),
        ({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}, [1, 2, 3], None),
        (REGIONS, [2, 1], "1 becomes 2, 2 becomes 1. Outer regions come first"),
        ({"background": 0, "left": 2, "both": [1, 2]}, [2, 1], "2 becomes 1. Outer regions come first"),
        ({"background": 0, "all": [1, 2], "a": 1, "b": 2}, [0, 1, 2], None),  # as assemblies have it
        ({"background": 0, "a": [1, 2], "b": [2, 3]}, [1, 3], "2 becomes 3. Each region needs a value that no"),
        ({"background": 0, "a": [1, 3], "b": [2, 3], "c": 3}, [1, 2, 3], None),
        ({"background": 0, "zero": [0], "whole": [1, 2], "r": 1}, [2, 1], None),  # nnU-Net does not paint [0]
        ({"background": 0, "whole": [1, 2]}, [1], None),  # nothing could tell 1 from 2
        (
            {"background": 0, "r": 1, "whole": [1, 2], "ignore": 3},
            [1, 2],
            '{"background": 0, "whole": [1, 2], "r": 1, "ignore": 3}, "regions_class_order": [2, 1].',
        ),
        ({"background": 0, "a": [2, 3], "b": [3, 1], "c": 2}, [3, 1, 2], '"b": [3, 1], "a": [2, 3], "c": 2}'),
        (SOUND["labels"], [1, 2], None),
    ],
)
def test_orders_of_regions_that_hide_others(labels, order, said):
    found = order_warnings({"labels": labels, "regions_class_order": order})
    assert len(found) == (said is not None) and all(said in text for text in found)


def test_the_modality(tmp_path):
    assert shows_ct(read(tmp_path, channel_names={"0": "ct", "1": "PET"}))
    assert not shows_ct(read(tmp_path, channel_names={"0": "PET", "1": "CT"}))


def test_names_follow_the_values_whatever_their_type(tmp_path):
    labels = read(tmp_path, labels={"background": "0", "b": "2", "a": 1})["labels"]
    assert foreground_names(labels, has_regions=False) == ["a", "b"]


@pytest.mark.slow
@pytest.mark.parametrize("locale, code", [("C", 2), ("C.UTF-8", 0)])
def test_umlauts_and_the_locale(tmp_path, locale, code):
    """nnU-Net opens the file in the encoding of the locale."""
    content = {**SOUND, "labels": {"background": 0, "Milz (gro\u00df)": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    script = (
        "import sys; from pathlib import Path; from fsefs_nnunet.cases.dataset_json import read_dataset_json; "
        "read_dataset_json(Path(sys.argv[1]))"
    )
    plain = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", script, str(tmp_path / "dataset.json")]
    done = subprocess.run(command, env={**os.environ, **plain}, capture_output=True, text=True)
    assert bool(done.returncode) == bool(code) and "Traceback" not in done.stderr
    assert ("has non-ASCII names" in done.stderr and "set PYTHONUTF8=1" in done.stderr) == bool(code)


# of FSEFT_SHARED/field/dataset_json: what occurs in public. None: accepted
PUBLIC = {
    "01_autopetv_five_channels": None,
    "02_stenunet_png_grey": None,
    "03_stenunet_png_two_channels": None,
    "04_amos_v1_training_list": "labels has names and values swapped",
    "05_flare23_names_with_spaces": None,
    "06_uppect": None,
    "10_region_list_and_int_plus_sign": None,
    "12_spinal_cord_lesion_regions": None,
    "14_plain_labels_with_regions_class_order": None,
    "16_ct_and_lowercase_nonorm_mha": None,
    "18_vesuvius_tif_ignore": None,
    "20_label_value_as_string_mha": None,
    "22_brackets_in_a_name_mha": None,
    "24_v1_modality_nonorm": 'write "labels": {"background": 0, "tumour": 1}',
    "26_labels_from_intensities": "labels must be in consecutive order (0, 1, 2, ...), 10, 60 do not satisfy this",
    "28_nrrd_no_channel_names": "channel_names is missing",
    "30_dataset_key_relative_paths": None,
    "32_dataset_key_environment_variables": None,
    "34_multitask_png_no_foreground": "labels names nothing but background",
    "36_tumor_before_pancreas_mha": None,
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_ones(shared, name):
    file, sentence = shared / "field" / "dataset_json" / f"{name}.json", PUBLIC[name]
    if sentence is None:
        assert read_dataset_json(file)["labels"]["background"] == 0
        return
    with pytest.raises(InputError) as error:
        read_dataset_json(file)
    assert sentence in str(error.value)
