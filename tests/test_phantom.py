import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

from fsefs_nnunet.synthetic.datasets import (
    HELD_OUT,
    SOURCES,
    TEMPLATE,
    write_dataset,
    write_pretraining_assembly,
)
from fsefs_nnunet.synthetic.phantom import LABELS, PhantomConfig, make_phantom, pretraining_config, smooth_field

FULL = PhantomConfig(shape=(64, 64, 64), spacing=6.0)


@pytest.fixture(scope="module")
def phantoms():
    return [make_phantom(seed, FULL) for seed in range(6)]


def centre(phantom, name):
    """Centroid in voxels from the middle of the volume."""
    return np.argwhere(phantom.labels == LABELS[name]).mean(0) - (np.array(phantom.labels.shape) - 1) / 2


def test_same_seed_same_voxels(phantoms):
    again = make_phantom(0, FULL)
    assert np.array_equal(again.image, phantoms[0].image)
    assert np.array_equal(again.labels, phantoms[0].labels)
    assert not np.array_equal(phantoms[1].labels, phantoms[0].labels)


# Voxels of each label; mean, standard deviation and some voxels of the image.
GOLDEN = {
    "demo": (
        ((2024, 0), PhantomConfig(shape=(56, 48, 48), spacing=6.0, centre=(0.0, 0.0, 0.08), drift=1.6)),
        [116153, 5591, 2414, 206, 325, 330, 414, 553, 101, 40, 116, 2049, 732],
        [-234.843, 243.586, -634.767, -116.53, -46.136, -56.978],
    ),
    "pretraining, as CT": (
        ((0, 2), pretraining_config((0, 2), (32, 32, 32))),
        [28094, 2300, 412, 184, 126, 91, 152, 170, 36, 19, 25, 754, 405],
        [-256.919, 321.629, -691.975, -25.764, 45.566],
    ),
    "pretraining, random": (
        ((0, 5), pretraining_config((0, 5), (32, 32, 32))),
        [29286, 608, 592, 378, 46, 210, 215, 242, 0, 38, 73, 733, 347],
        [-47.541, 86.597, -96.197, -215.084, -94.212],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_phantoms_stay_what_the_backbone_learned_from(name):
    arguments, voxels, intensities = GOLDEN[name]
    image, labels = (phantom := make_phantom(*arguments)).image, phantom.labels
    # libraries may differ in the last bit of a float, which moves a voxel from one organ to the next
    np.testing.assert_allclose(np.bincount(labels.ravel(), minlength=13), voxels, atol=3)
    np.testing.assert_allclose([image.mean(), image.std(), *image[10, ::12, 20]], intensities, atol=0.1)


def millilitres(phantom):
    return np.bincount(phantom.labels.ravel(), minlength=13)[1:] * np.prod(phantom.spacing) / 1000


def test_thick_slices_show_the_same_organs():
    thick = make_phantom(0, PhantomConfig(shape=(256, 256, 40), spacing=(1.25, 1.25, 7.7)))
    isotropic = make_phantom(0, PhantomConfig(shape=(80, 80, 77), spacing=4.0))
    assert thick.spacing == (1.25, 1.25, 7.7) and isotropic.spacing == (4.0, 4.0, 4.0)
    np.testing.assert_allclose(millilitres(thick), millilitres(isotropic), rtol=0.05)
    mean, expected = (
        [phantom.image[phantom.labels == value].mean() for value in LABELS.values()] for phantom in (thick, isotropic)
    )
    np.testing.assert_allclose(mean, expected, rtol=0.2)  # blur and bias field differ


def test_types(phantoms):
    config = PhantomConfig(shape=(20, 24, 28), spacing=9.0)
    phantom = make_phantom((1, 2), config)
    assert phantom.image.shape == phantom.labels.shape == config.shape
    assert phantom.image.dtype == np.float32 and phantom.labels.dtype == np.uint8
    assert phantom.spacing == (9.0, 9.0, 9.0)
    assert np.isfinite(phantom.image).all()


def test_every_organ_is_in_a_full_view(phantoms):
    for phantom in phantoms:
        assert set(np.unique(phantom.labels)) == {0, *LABELS.values()}


def test_organs_lie_on_their_side(phantoms):
    """x grows to the patient's right, y to the front, z to the head."""
    for phantom in phantoms:
        x, y, z = np.transpose([centre(phantom, name) for name in LABELS])
        at = {name: i for i, name in enumerate(LABELS)}
        for name in ("liver_right_lobe", "kidney_right", "gallbladder", "inferior_vena_cava"):
            assert x[at[name]] > 0, name
        for name in ("spleen", "kidney_left", "stomach", "pancreas_tail"):
            assert x[at[name]] < 0, name
        assert x[at["liver_right_lobe"]] > x[at["liver_left_lobe"]]
        assert x[at["pancreas_head"]] > x[at["pancreas_tail"]]
        assert x[at["inferior_vena_cava"]] > x[at["aorta"]]
        assert y[at["vertebrae"]] < min(y[at["aorta"]], y[at["stomach"]], y[at["gallbladder"]])
        assert z[at["spleen"]] > max(z[at["kidney_left"]], z[at["kidney_right"]])


def test_organs_have_their_tissue_values(phantoms):
    for phantom in phantoms:
        mean = {name: phantom.image[phantom.labels == value].mean() for name, value in LABELS.items()}
        assert mean["gallbladder"] < mean["liver_right_lobe"]
        # both lobes are one tissue, but for bias field and blur
        assert abs(mean["liver_right_lobe"] - mean["liver_left_lobe"]) < 35
        assert phantom.image[:4, :4].mean() < -800


def test_a_smaller_view_magnifies():
    view = make_phantom(0, replace(FULL, spacing=3.0, centre=(0.42, 0.02, 0.28)))
    full = make_phantom(0, FULL)
    liver = LABELS["liver_right_lobe"]
    assert (view.labels == liver).mean() > 3 * (full.labels == liver).mean()
    assert LABELS["spleen"] not in view.labels


def test_drift_raises_noise_and_lowers_the_gain():
    noise, level = [], []
    for drift in (0.0, 0.5, 1.0):
        image = make_phantom(3, replace(FULL, drift=drift)).image
        air = image[:8, :8]
        noise.append(np.diff(air, axis=2).std() / np.sqrt(2))
        level.append(air.mean())
    assert noise[0] == pytest.approx(8, rel=0.1)
    assert noise[1] > 1.4 * noise[0] and noise[2] > 1.2 * noise[1]
    assert level[0] < level[1] < level[2] < -600


def test_random_appearance_keeps_the_anatomy_recognisable():
    """Tissue values change from volume to volume, places do not."""
    drawn = [make_phantom(seed, replace(FULL, appearance="random")) for seed in range(6)]
    livers = [p.image[p.labels == LABELS["liver_right_lobe"]].mean() for p in drawn]
    assert np.std(livers) > 50
    assert all(centre(p, "liver_right_lobe")[0] > 0 > centre(p, "spleen")[0] for p in drawn)


@pytest.mark.parametrize(
    "wrong",
    [
        {"appearance": "mr"},
        {"shape": (64, 64, 7)},
        {"spacing": 0.0},
        {"spacing": -1.0},
        {"spacing": (1.0, 1.0, 0.0)},
        {"spacing": (1.0, 1.0)},
        {"drift": -0.1},
    ],
)
def test_config_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PhantomConfig(**wrong)


@pytest.mark.parametrize("knots", [1, 4, 9, (2, 9, 4)])
def test_smooth_field(knots):
    field = smooth_field(np.random.default_rng(0), (24, 30, 36), knots)
    assert field.shape == (24, 30, 36) and field.dtype == np.float32
    assert field.std() == pytest.approx(1, rel=1e-4)
    # a spline with `knots` intervals moves little between neighbours
    for axis, k in enumerate(np.broadcast_to(knots, 3)):
        assert np.abs(np.diff(field, axis=axis)).max() < 0.35 * k


def test_pretraining_ranges():
    configs = [pretraining_config((0, i)) for i in range(300)]
    views = np.array([c.extent.max() / 2 / 190 for c in configs])
    assert 0.4 <= views.min() < 0.45 and 1.0 < views.max() <= 1.05
    assert all(0 <= c.drift <= 1 for c in configs)
    assert np.mean([c.appearance == "random" for c in configs]) == pytest.approx(0.5, abs=0.1)
    assert all(np.abs(c.centre).max() <= max(0, 1 - view) + 1e-6 for c, view in zip(configs, views))
    assert pretraining_config((0, 7)) == configs[7]


@pytest.fixture(scope="module")
def assembly(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw") / "Dataset901_Assembly"
    write_pretraining_assembly(folder, num_cases=4, num_held_out=2, seed=0, num_processes=1, size=32)
    return folder


def values(names):
    return {v for name in names for v in np.atleast_1d(TEMPLATE[name]).tolist()}


def test_assembly_holds_annotated_labels_alone(assembly):
    content = json.loads((assembly / "dataset.json").read_text())["sources"]
    assert [len(content[name]["cases"]) for name in SOURCES] == [1, 1, 1, 1]
    assert len(content[HELD_OUT]["cases"]) == 2
    removed = 0
    for source in content.values():
        annotated = values(source["classes"])
        for case in source["cases"]:
            seed = (0, int(case[-5:]))
            phantom = make_phantom(seed, pretraining_config(seed, (32, 32, 32)))
            file = nib.load(assembly / "labelsTr" / f"{case}.nii.gz")
            labels = np.asarray(file.dataobj)
            expected = np.where(np.isin(phantom.labels, list(annotated)), phantom.labels, 0)
            assert np.array_equal(labels, expected)
            assert nib.aff2axcodes(file.affine) == ("R", "A", "S")
            image = np.asarray(nib.load(assembly / "imagesTr" / f"{case}_0000.nii.gz").dataobj)
            assert np.abs(image - phantom.image).max() <= 0.5
            removed += bool((expected != phantom.labels).any())
    assert removed >= 4  # otherwise the comparison above proves nothing


def test_stomach_is_in_no_source():
    assert LABELS["stomach"] not in values(TEMPLATE)
    counts = {name: sum(name in classes for classes in SOURCES.values()) for name in TEMPLATE}
    assert min(counts.values()) >= 2, counts


def test_assembly_passes_nnunets_check(assembly):
    verify_dataset_integrity(str(assembly), num_processes=1)


def test_headers_say_the_spacing_of_each_axis(tmp_path):
    folder = tmp_path / "Dataset903_Thick"
    config = PhantomConfig(shape=(24, 28, 12), spacing=(12.5, 11.0, 25.0))
    write_dataset(folder, [("case", 5, config, {1: 1}, None)], {"liver": 1}, 1)
    for file in ("imagesTr/case_0000.nii.gz", "labelsTr/case.nii.gz"):
        np.testing.assert_allclose(nib.load(folder / file).header.get_zooms(), config.spacing)


def test_plain_dataset(tmp_path):
    folder = tmp_path / "Dataset902_Plain"
    config = PhantomConfig(shape=(32, 32, 32), spacing=12.0)
    jobs = [(f"case_{i}", (5, i), config, {3: 2, 12: 1}, None) for i in range(2)]
    write_dataset(folder, jobs, {"stomach": 1, "spleen": 2}, 1, sources={"x": 1})
    for i in range(2):
        file = nib.load(folder / "labelsTr" / f"case_{i}.nii.gz")
        assert set(np.unique(np.asarray(file.dataobj))) == {0, 1, 2}
        np.testing.assert_allclose(file.header.get_zooms(), 12.0)
    content = json.loads((folder / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "stomach": 1, "spleen": 2}
    assert content["numTraining"] == 2 and content["sources"] == {"x": 1} and content["name"] == folder.name
