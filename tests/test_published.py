"""Published checkpoints become backbones by their content, whole or not at all."""

import json
import os
import re
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

import pytest
import torch
from filelock import FileLock
from published_files import (
    LAYOUTS,
    layout,
    meta_content,
    narrow_state,
    published_swin,
    random_tensors,
    wrapped,
    write_constants,
    write_published,
)

from fsefs_nnunet.backbones.architectures import stage_maps
from fsefs_nnunet.backbones.checkpoints import read_checkpoint
from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.backbones.published.importing import import_published
from fsefs_nnunet.backbones.published.layouts import recognise
from fsefs_nnunet.backbones.store import find_backbone, known_backbones, load_weights, sha256_of, user_folder
from fsefs_nnunet.backbones.zoo import ZOO
from fsefs_nnunet.cli.main import main

TEXT_HEAD, CONSTANTS = "the head that is conditioned on text", "constants that are computed anew"
STATISTICS, TASKS = "running statistics, which the network never uses", "heads of the self-supervised tasks"
SWIN, ENCODER, UNET = 149, 118, 62  # tensors of the backbone without a linear head
# file -> the public id, tensors that are taken, why and how many others are not
FILES = {
    "fseft": ("fseft", SWIN + 2, {CONSTANTS: 8}),
    "fseft_noprefix": ("fseft", SWIN + 2, {CONSTANTS: 8}),
    "btcv": ("btcv", SWIN + 2, {CONSTANTS: 8}),
    "clipdriven_swinunetr": ("clipdriven", SWIN, {TEXT_HEAD: 13, CONSTANTS: 8}),
    "clipdriven_swinunetr_flat": ("clipdriven", SWIN, {TEXT_HEAD: 13, CONSTANTS: 8}),
    "clipdriven_unet": ("clipdriven_unet", UNET, {TEXT_HEAD: 13, STATISTICS: 42}),
    "suprem_swinunetr": ("suprem_swinunetr", SWIN, {TEXT_HEAD: 13, CONSTANTS: 8}),
    "suprem_swinunetr_backbone": ("suprem_swinunetr", SWIN, {CONSTANTS: 8}),
    "suprem_unet": ("suprem_unet", UNET, {TEXT_HEAD: 13, STATISTICS: 42}),
    "suprem_unet_backbone": ("suprem_unet", UNET, {STATISTICS: 42}),
    "selfsup_model_swinvit": ("selfsup", ENCODER, {CONSTANTS: 8, TASKS: 8}),
    "selfsup_variant_swinViT_prefix": ("selfsup", ENCODER, {CONSTANTS: 8}),
}


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("fseft_backbones", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture(scope="module")
def swin_store(tmp_path_factory):
    """fseft and selfsup at full size, their files' tensors, and what importing printed."""
    pytest.importorskip("monai", reason="Swin UNETR needs MONAI: pip install fsefs_nnunet[monai]")
    root = tmp_path_factory.mktemp("swin")
    files = {id: write_published(root / f"{id}.pth", name) for id, name in SWIN_FILES.items()}
    for id in files:
        import_published(id, root / f"{id}.pth", root)
    return root, files


SWIN_FILES = {"fseft": "fseft", "selfsup": "selfsup_model_swinvit"}


# ---- every layout ----


def test_layouts_are_the_published_ones(shared):
    for name, content in LAYOUTS["files"].items():
        manifest = json.loads((shared / "manifests" / f"{name}.json").read_text())
        ours = {key: [list(shape), str(dtype).removeprefix("torch.")] for key, (shape, dtype) in layout(name).items()}
        assert list(ours.items()) == list(manifest["keys"].items()) and content["wrapper"] == manifest["top_level"]


@pytest.mark.parametrize("name", FILES)
def test_layout_is_recognised(name):
    backbone_id, taken, left_out = FILES[name]
    entry, content = ZOO[backbone_id], recognise(name, meta_content(name))
    assert (content.kind, content.features, content.encoder_only) == (entry.kind, entry.features, entry.encoder_only)
    assert content.rows == (len(entry.classes) if entry.head else 0)
    assert len(content.tensors) == taken
    assert {why: len(names) for why, names in content.left_out.items()} == left_out
    assert content.embedded_classes == (32 if TEXT_HEAD in left_out else None)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, (id, *_) in FILES.items() if ZOO[id].kind == "swin_unetr"])
def test_swin_layouts_have_the_backbones_names_and_shapes(swin_store, name):
    """Those of the backbone that fseft.pth became, the head aside."""
    own = {key: t.shape for key, t in load_weights_in(swin_store[0], "fseft").items() if not key.startswith("head")}
    content = recognise(name, meta_content(name))
    shapes = {key: t.shape for key, t in content.tensors.items() if not key.startswith("head")}
    assert shapes.items() <= own.items()
    assert content.encoder_only or shapes.keys() == own.keys()


# one of each kind: with a linear head, with one on text, of an encoder, and the U-Net
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["btcv", "clipdriven_swinunetr_flat", "selfsup_variant_swinViT_prefix", "suprem_unet_backbone"]
)
def test_layout_is_imported(store, tmp_path, name):
    """Every number of the file arrives under the name that recognise gives its tensor."""
    if ZOO[FILES[name][0]].kind == "swin_unetr":
        pytest.importorskip("monai", reason="Swin UNETR needs MONAI: pip install fsefs_nnunet[monai]")
    write_constants(tmp_path / "file.pth", name)
    contract = import_published(FILES[name][0], tmp_path / "file.pth", store)
    expected = recognise(name, read_checkpoint(tmp_path / "file.pth")).tensors
    stored = load_weights(find_backbone(contract.id))
    assert expected.keys() <= stored.keys() and len({t.flatten()[0].item() for t in expected.values()}) == len(expected)
    for key, tensor in expected.items():
        assert stored[key].shape == tensor.shape and (stored[key] == tensor.flatten()[0]).all(), key


def load_weights_in(root, backbone_id: str) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("fseft_backbones", str(root))
        return load_weights(find_backbone(backbone_id))


@pytest.mark.slow
def test_swin_values(swin_store):
    """Tensors of the file are where the network has them; what the file lacks is the same for everyone."""
    root, files = swin_store
    fseft, selfsup = (load_weights_in(root, id) for id in SWIN_FILES)
    theirs = files["fseft"]
    for ours, name in {
        "head.bias": "module.classifier.bias",
        "network.swinViT.layers3.0.blocks.1.mlp.linear2.weight": "module.swinViT.layers3.0.blocks.1.mlp.linear2.weight",
        "network.decoder1.conv_block.conv3.conv.weight": "module.decoder1.conv_block.conv3.conv.weight",
        "network.encoder10.layer.conv1.conv.weight": "module.encoder10.layer.conv1.conv.weight",
    }.items():
        assert torch.equal(fseft[ours], theirs[name])
    theirs = files["selfsup"]
    key = "layers4.0.blocks.0.mlp"
    assert torch.equal(selfsup[f"network.swinViT.{key}.linear1.weight"], theirs[f"module.{key}.fc1.weight"])
    decoder = selfsup["network.decoder2.transp_conv.conv.weight"]
    assert decoder.std() > 0 and len(selfsup) == SWIN


def test_unet_values(store, tmp_path, capsys):
    """Full size; the report says what was taken, what was left out, and whose licence it is."""
    theirs = write_published(tmp_path / "any_name.bin", "suprem_unet")
    assert main(["backbones", "import", "suprem_unet", str(tmp_path / "any_name.bin")]) == 0
    out = capsys.readouterr().out
    assert "a 3D U-Net of SuPreM, 64 features. All 62 tensors of the backbone matched, 19073600 numbers." in out
    assert f"Left out, {TEXT_HEAD}: 13 (module.organ_embedding, ...)" in out and f"Left out, {STATISTICS}: 42" in out
    assert "The file is not the known supervised_suprem_unet_2100.pth: its SHA-256 differs." in out
    assert (
        "Files of clipdriven_unet have the same layout: nothing in this one shows that it is the file of suprem" in out
    )
    assert "Licence: Apache-2.0" in out and "Citation: Li, Yuille, Zhou" in out
    contract = find_backbone("suprem_unet")
    left_out = contract.source.pop("left_out")
    assert {why: len(names) for why, names in left_out.items()} == {TEXT_HEAD: 13, STATISTICS: 42}
    assert "module.organ_embedding" in left_out[TEXT_HEAD]
    assert contract.source == {"file": "any_name.bin", "sha256": sha256_of(tmp_path / "any_name.bin")}
    assert contract.sha256 == sha256_of(store / "suprem_unet.safetensors")
    ours, prefix = load_weights(contract), "module.backbone."
    assert torch.equal(ours["encoder.2.1.norm.bias"], theirs[prefix + "down_tr256.ops.1.bn1.bias"])
    assert torch.equal(ours["decoder.0.0.conv.weight"], theirs[prefix + "up_tr256.ops.0.conv1.weight"])
    assert torch.equal(ours["upsample.2.weight"], theirs[prefix + "up_tr64.up_conv.weight"])
    assert FrozenBackbone("suprem_unet", "last").out_channels == 64


ABDOMINAL = [entry for entry in ZOO.values() if entry.kind in ("swin_unetr", "suprem_unet")]


@pytest.mark.parametrize("entry", ABDOMINAL, ids=lambda e: e.id)
def test_contracts(entry):
    """RAS, x-y-z, 1.5 mm, HU [-175, 250] to [0, 1], 96^3; what the adapter gets."""
    contract = entry.contract({})
    assert (contract.image_reader_writer, contract.transpose_forward) == ("NibabelIOWithReorient", (2, 1, 0))
    assert contract.spacing == (1.5, 1.5, 1.5) and contract.patch_size == contract.smallest_window == (96, 96, 96)
    window = contract.foreground_intensity_properties_per_channel["0"]
    assert window == {"percentile_00_5": -175, "percentile_99_5": 250, "mean": -175, "std": 425}
    assert contract.resampling_fn_data_kwargs["order"] == 1
    assert stage_maps(contract) == {"last": [FeatureMap(entry.features)]}
    assert (len(contract.head_classes) > 0) == (entry.id in ("fseft", "btcv"))
    assert contract.softmax == (entry.id == "btcv")
    assert contract.divisor[0] == (8 if entry.kind == "suprem_unet" else 32)
    if entry.link:
        assert entry.link.endswith(f"/{entry.file}")


# ---- narrow Swin UNETR ----


def import_swin(backbone_id: str, tensors: dict, tmp_path, store, monkeypatch) -> dict[str, torch.Tensor]:
    """Import as a public backbone of 12 features; returns the stored weights."""
    monkeypatch.setitem(ZOO, backbone_id, replace(ZOO[backbone_id], features=12))
    torch.save({"state_dict": tensors}, tmp_path / "x.pth")
    return load_weights(import_published(backbone_id, tmp_path / "x.pth", store))


def test_btcv_head_and_the_spellings_of_its_transformer(store, tmp_path, monkeypatch):
    pytest.importorskip("monai", reason="Swin UNETR needs MONAI: pip install fsefs_nnunet[monai]")
    state = narrow_state("btcv", 12)
    for spelling in ("module.swin_vit", "backbone.swinViT"):
        weights = import_swin("btcv", published_swin(state, spelling), tmp_path, store, monkeypatch)
        assert weights.keys() == state.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in state.items())
    assert weights["head.weight"].shape == (14, 12, 1, 1, 1) and find_backbone("btcv").softmax


def test_selfsup_says_that_its_decoder_is_random(store, tmp_path, monkeypatch, capsys):
    pytest.importorskip("monai", reason="Swin UNETR needs MONAI: pip install fsefs_nnunet[monai]")
    tensors = published_swin(narrow_state("selfsup", 12), "module")
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("module")}
    import_swin("selfsup", tensors, tmp_path, store, monkeypatch)
    assert "Backbone 'selfsup' is an encoder; its decoder is random and must be tuned.\n" in capsys.readouterr().out


def test_swin_unetr_of_another_width(store, tmp_path):
    pytest.importorskip("monai", reason="Swin UNETR needs MONAI: pip install fsefs_nnunet[monai]")
    tensors = published_swin(narrow_state("btcv", 12))
    text = refusal("btcv", tensors, tmp_path, store)
    assert "a Swin UNETR, 12 features, 14 rows of a linear head; 'btcv' is a Swin UNETR, 48 features" in text
    contract = import_published("own", tmp_path / "file.pth", store)
    assert contract.architecture["features"] == 12 and contract.classes == ()
    assert "rows of a head whose classes the file does not name" in contract.source["left_out"]


# ---- files that are not what their name says ----


def refusal(backbone_id: str, content, tmp_path, store) -> str:
    """The sentence that importing `content` as `backbone_id` ends with; nothing is stored."""
    file = tmp_path / "file.pth"
    torch.save(content, file)
    with pytest.raises(ValueError) as error:
        import_published(backbone_id, file, store)
    assert backbone_id not in known_backbones() and not list(store.glob("*.safetensors*"))
    text = str(error.value)
    assert text.startswith(str(file)) and "\n" not in text
    return text


def zeros(name: str) -> dict[str, torch.Tensor]:
    """Tensors of the right shapes that take no room in the file."""
    return {key: torch.zeros((), dtype=dtype).expand(shape) for key, (shape, dtype) in layout(name).items()}


@pytest.mark.parametrize(
    "name, backbone_id, sentence",
    [
        ("fseft", "suprem_unet", "a Swin UNETR, 48 features, 29 rows .* 'suprem_unet' is a 3D U-Net .* as fseft, or"),
        ("suprem_unet", "fseft", "a 3D U-Net of SuPreM, 64 features; 'fseft' is .* as clipdriven_unet or suprem_unet"),
        ("btcv", "fseft", "14 rows of a linear head; 'fseft' is .* 29 rows of a linear head: import it as btcv, or"),
        ("btcv", "selfsup", "'selfsup' is the encoder alone of a Swin UNETR, 48 features: import it as btcv, or"),
        ("selfsup_model_swinvit", "btcv", "holds the encoder alone .*: import it as selfsup, or"),
        ("suprem_swinunetr", "fseft", "import it as clipdriven or suprem_swinunetr, or take the file of 'fseft'"),
    ],
)
def test_another_backbones_file(store, tmp_path, name, backbone_id, sentence):
    assert re.search(sentence, refusal(backbone_id, wrapped(name, zeros(name)), tmp_path, store))


def test_rows_beside_a_head_on_text_are_no_reason_to_refuse(store, tmp_path):
    """The file is refused for what it lacks, not for what nobody needs."""
    pytest.importorskip("monai", reason="Swin UNETR needs MONAI: pip install fsefs_nnunet[monai]")
    tensors = zeros("suprem_swinunetr") | {"module.backbone.out.conv.conv.weight": torch.zeros(32, 48, 1, 1, 1)}
    del tensors["module.backbone.decoder3.transp_conv.conv.weight"]
    text = refusal("suprem_swinunetr", {"net": tensors}, tmp_path, store)
    assert "lacks 1 of the 149 tensors of a Swin UNETR, e.g. network.decoder3.transp_conv.conv.weight" in text


def test_another_width(store, tmp_path):
    tensors = random_tensors("suprem_unet", width=4)
    text = refusal("suprem_unet", wrapped("suprem_unet", tensors), tmp_path, store)
    assert "a 3D U-Net of SuPreM, 16 features; 'suprem_unet' is a 3D U-Net of SuPreM, 64 features" in text


def edited(change) -> dict:
    tensors = random_tensors("suprem_unet", width=8)
    change(tensors)
    return {"net": tensors}


KEY = "module.backbone.up_tr128.ops.0.conv1.bias"


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda t: t.pop(KEY), "lacks 1 of the 62 tensors of a 3D U-Net of SuPreM, e.g. decoder.1.0.conv.bias"),
        (lambda t: t.update({KEY: torch.zeros(3)}), "1 have another shape, e.g. decoder.1.0.conv.bias of shape (3,)"),
        (lambda t: t[KEY].fill_(float("nan")), "holds NaN or infinite weights, e.g. decoder.1.0.conv.bias"),
        (lambda t: t.update({"teacher." + KEY: t[KEY]}), f"holds two networks: {KEY} and teacher.{KEY}"),
        (lambda t: t.update({KEY.replace("ops.0", "ops.2"): t[KEY]}), "1 tensors are unknown"),
        (
            lambda t: t.update({"module.backbone.down_tr1024.ops.0.conv1.weight": t[KEY]}),
            "is not a plain 3D U-Net of SuPreM: it has 1 more tensors inside, e.g. module.backbone.down_tr1024",
        ),
        (lambda t: t.pop("module.backbone.up_tr64.ops.1.conv1.weight"), "without its first or last layer"),
        (
            lambda t: t.clear(),
            "holds none of the known architectures (Swin UNETR, ",
        ),
    ],
)
def test_files_that_are_not_whole(store, tmp_path, change, sentence):
    assert sentence in refusal("narrow", edited(change), tmp_path, store)


def test_a_teacher_and_a_student(store, tmp_path):
    tensors = random_tensors("suprem_unet", width=8)
    text = refusal("narrow", {"state_dict": tensors, "ema": {"teacher": tensors}}, tmp_path, store)
    assert "holds two networks, under 'state_dict' and 'ema.teacher': save the state_dict of one alone." in text
    other = {"a": tensors, "b": zeros("fseft")}
    assert re.search("holds two networks, under 'b' and 'a'", refusal("narrow", other, tmp_path, store))


def test_wrappers_in_wrappers():
    tensors = {"encoder1.layer.conv1.conv.weight": torch.zeros(2), "swinViT.patch_embed.proj.weight": torch.zeros(2)}
    assert len(recognise("x", {"model": {"state_dict": tensors, "optimizer": {"state": {}}}}).tensors) == 2


def test_the_known_file_of_another_backbone(store, tmp_path, monkeypatch):
    torch.save(edited(lambda tensors: None), tmp_path / "x.pth")
    narrow = {id: replace(ZOO[id], features=8) for id in ("suprem_unet", "clipdriven_unet")}
    narrow["suprem_unet"] = replace(narrow["suprem_unet"], sha256=sha256_of(tmp_path / "x.pth"))
    for id, entry in narrow.items():
        monkeypatch.setitem(ZOO, id, entry)
    with pytest.raises(
        ValueError, match=r"x\.pth is the file of suprem_unet, according to its SHA-256: import it as suprem_unet\."
    ):
        import_published("clipdriven_unet", tmp_path / "x.pth", store)
    import_published("suprem_unet", tmp_path / "x.pth", store)


@pytest.mark.parametrize("content", [[1, 2], {"net": 3}, {}, torch.zeros(3), {"layer.weight": torch.zeros(2)}])
def test_files_without_a_network(store, tmp_path, content):
    assert "holds none of the known architectures" in refusal("fseft", content, tmp_path, store)


def test_an_id_of_ones_own(store, tmp_path):
    """What the file holds is found out; classes it cannot name."""
    torch.save(edited(lambda tensors: None), tmp_path / "own.pth")
    contract = import_published("own", tmp_path / "own.pth", store)
    assert contract.architecture == {"kind": "suprem_unet", "features": 8, "head": False, "encoder_only": False}
    assert contract.classes == () and contract.licence.startswith("unknown")
    with torch.no_grad():
        assert FrozenBackbone("own", "last")(torch.zeros(1, 1, 16, 16, 16))[0].shape == (1, 8, 16, 16, 16)


def test_a_head_on_other_classes_than_the_published_list(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(ZOO, "suprem_unet", replace(ZOO["suprem_unet"], features=8))
    torch.save(edited(lambda t: t.update({"module.organ_embedding": torch.zeros(25, 512)})), tmp_path / "x.pth")
    assert import_published("suprem_unet", tmp_path / "x.pth", store).classes == ()
    assert "Classes: unknown." in capsys.readouterr().out


def test_a_checkpoint_that_is_named_zip(store, tmp_path, capsys):
    torch.save(edited(lambda tensors: None), tmp_path / "weights.zip")
    assert main(["backbones", "import", "own", str(tmp_path / "weights.zip")]) == 0
    assert "All 62 tensors of the backbone matched" in capsys.readouterr().out


@pytest.mark.parametrize(
    "id, said", [("fseft", "nofile.pth does not exist: give"), ("phantom", "'phantom' is the backbone that comes with")]
)
def test_what_is_not_looked_into(store, tmp_path, capsys, id, said):
    assert main(["backbones", "import", id, str(tmp_path / "nofile.pth")]) == 2
    assert said in capsys.readouterr().err and not store.exists()


def test_a_public_name_for_a_nnunet_model(store, tmp_path, capsys):
    assert main(["backbones", "import", "fseft", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "'fseft' is a public backbone, and" in error and "is not its file, fseft.pth" in error


class RunsCode:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_file_that_would_run_code(store, tmp_path):
    witness = tmp_path / "ran"
    text = refusal("fseft", {"net": zeros("fseft"), "args": RunsCode(f"touch {witness}")}, tmp_path, store)
    assert "was not opened: it holds more than weights" in text and not witness.exists()


def test_a_truncated_file(store, tmp_path):
    write_published(tmp_path / "x.pth", "suprem_unet", width=8)
    content = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"x\.pth is damaged or incomplete: download or copy it again"):
        import_published("suprem_unet", tmp_path / "x.pth", store)


@pytest.mark.parametrize(
    "page",
    [b"\n<!DOCTYPE html><html>Sign in</html>", b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\n"],
)
def test_a_web_page_saved_as_checkpoint(store, tmp_path, capsys, page):
    (tmp_path / "fseft.pth").write_bytes(page)
    assert main(["backbones", "import", "fseft", str(tmp_path / "fseft.pth")]) == 2
    assert "fseft.pth was not opened: it is a web page or a pointer" in capsys.readouterr().err


# ---- the store ----

IMPORT = (
    "import sys; from fsefs_nnunet.cli.main import main; sys.exit(main(['backbones', 'import', 'own', sys.argv[1]]))"
)


@pytest.mark.slow
def test_full_disk(store, tmp_path):
    """Stood in for by a limit on the size of files, which the weights exceed and the lock does not."""
    write_published(tmp_path / "x.pth", "suprem_unet", width=8)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    result = subprocess.run(
        [sys.executable, "-c", IMPORT, tmp_path / "x.pth"], preexec_fn=limit, capture_output=True, encoding="utf-8"
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"fseft: Backbone 'own' was not stored in {store} (" in result.stderr
    assert "make room there, or choose another folder with the environment variable fseft_backbones" in result.stderr
    assert [file.name for file in store.iterdir() if file.stat().st_size] == []
    assert "own" not in known_backbones()


def test_two_imports_at_once(store, tmp_path):
    """One waits for the other: while the lock of the id is held, none writes."""
    write_published(tmp_path / "x.pth", "suprem_unet", width=8)
    store.mkdir()
    with ThreadPoolExecutor() as pool:
        with FileLock(store / "own.lock"):
            imports = [pool.submit(import_published, "own", tmp_path / "x.pth", store) for _ in range(2)]
            assert not wait(imports, timeout=1).done
            assert [file.name for file in store.iterdir()] == ["own.lock"]
        assert imports[0].result() == imports[1].result() == find_backbone("own")
    FrozenBackbone("own", "last")  # verifies the weights
    assert sorted(file.suffix for file in store.iterdir()) == [".json", ".lock", ".safetensors"]


HOLD = "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print(); input()"


def test_two_processes_that_import(store, tmp_path):
    """The other one is stood in for by its lock."""
    write_published(tmp_path / "x.pth", "suprem_unet", width=8)
    store.mkdir()
    command = [sys.executable, "-c", HOLD, store / "own.lock"]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other,
        ThreadPoolExecutor() as pool,
    ):
        other.stdout.readline()  # it holds the lock
        waiting = pool.submit(import_published, "own", tmp_path / "x.pth", store)
        assert not wait([waiting], timeout=2).done
        assert [file.name for file in store.iterdir()] == ["own.lock"]
        other.communicate(b"\n")
        assert waiting.result() == find_backbone("own")


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("fseft_backbones", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert user_folder() == tmp_path / "data" / "fseft" / "backbones"
    monkeypatch.setenv("XDG_DATA_HOME", "")
    assert user_folder() == tmp_path / ".local" / "share" / "fseft" / "backbones"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert user_folder() == tmp_path / ".local" / "share" / "fseft" / "backbones"


@pytest.fixture
def own(store, tmp_path):
    """The store with one backbone in it, `own`."""
    torch.save(edited(lambda tensors: None), tmp_path / "x.pth")
    import_published("own", tmp_path / "x.pth", store)
    return store


def test_other_files_in_the_folder(own, capsys):
    (own / "notes.json").write_text('{"todo": 1}')
    (own / "._own.json").write_bytes(b"\x00\x05\x16\x07\xff\xfe")
    for verb in ("list", "verify"):
        assert main(["backbones", verb]) == 0
        out = capsys.readouterr().out
        assert "own: " in out and "notes: " not in out
        for name in ("notes.json", "._own.json"):
            assert f"{own / name} is skipped: it belongs to no backbone.\n" in out
    assert main(["backbones", "remove", "notes"]) == 2
    assert (own / "notes.json").exists()


def test_a_damaged_backbone_does_not_hide_the_others(own, capsys):
    (own / "own.json").write_text("{")
    assert main(["backbones", "list"]) == 0
    out = capsys.readouterr().out
    assert f"own: {own / 'own.json'} is not a backbone contract" in out and "phantom: 14 classes" in out
    assert "btcv: 14 classes, not installed: fseft backbones download btcv, size unknown; " in out
    assert main(["backbones", "verify"]) == 2
    assert "own.json is not a backbone contract" in capsys.readouterr().err
    assert main(["backbones", "remove", "own"]) == 0 and not list(own.glob("own.*"))


def test_a_contract_under_another_name(own, capsys):
    (own / "other.json").write_text((own / "own.json").read_text())
    (own / "other.safetensors").write_bytes(b"anything")
    for verb in ("verify", "info"):
        assert main(["backbones", verb, "other"]) == 2
        out, err = capsys.readouterr()
        assert "intact" not in out and f"{own / 'other.json'} is the contract of backbone 'own': give" in err


def test_weights_that_are_none(own, capsys):
    """Damaged before their SHA-256 was taken."""
    (own / "own.safetensors").write_bytes(b"anything")
    content = json.loads((own / "own.json").read_text())
    content["sha256"] = sha256_of(own / "own.safetensors")
    (own / "own.json").write_text(json.dumps(content))
    assert main(["backbones", "verify", "own"]) == 2
    assert "own.safetensors cannot be read (" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../victim", "victim/../../victim", "/victim", ""])
def test_remove_stays_in_the_folder(own, tmp_path, capsys, name):
    for ending in ("json", "safetensors"):
        (tmp_path / f"victim.{ending}").write_bytes((own / f"own.{ending}").read_bytes())
    assert main(["backbones", "remove", name]) == 2
    assert "cannot name a backbone" in capsys.readouterr().err
    assert (tmp_path / "victim.json").exists() and (tmp_path / "victim.safetensors").exists()


def test_folder_that_cannot_be_written(tmp_path):
    write_published(tmp_path / "x.pth", "suprem_unet", width=8)
    with pytest.raises(ValueError, match="'own' was not stored in .*x.pth/store .*make room there, or choose another"):
        import_published("own", tmp_path / "x.pth", tmp_path / "x.pth" / "store")


def test_list_info_verify_remove(store, tmp_path, capsys):
    def said(*argv: str) -> str:
        assert main(["backbones", *argv]) == 0
        return capsys.readouterr().out

    write_published(tmp_path / "x.pth", "suprem_unet", width=8)
    contract = import_published("own", tmp_path / "x.pth", store)
    capsys.readouterr()
    listed = said("list").splitlines()
    line = next(line for line in listed if line.startswith("own: "))
    assert f"0 classes, SHA-256 {contract.sha256[:12]}, " in line and f" GB, {store}; licence unknown" in line
    for entry in ZOO.values():
        line = next(line for line in listed if line.startswith(f"{entry.id}: "))
        assert f"not installed: {entry.how_to_get}, " in line and entry.licence in line and entry.citation in line
    assert f"SHA-256 {contract.sha256}\nImported from x.pth, SHA-256 {contract.source['sha256']}" in said("info", "own")
    info = said("info", "btcv")
    assert "btcv is not installed: fseft backbones download btcv" in info and "Head: 14 rows" in info
    assert said("verify") == "phantom: intact\nown: intact\n"
    weights = store / "own.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main(["backbones", "verify"]) == 2
    out, err = capsys.readouterr()
    assert out == "phantom: intact\n" and "own.safetensors are damaged" in err
    assert "own.safetensors was deleted." in said("remove", "own")
    assert not list(store.iterdir())
    for verb in ("remove", "info"):
        assert main(["backbones", verb, "own"]) == 2
    assert main(["backbones", "remove", "phantom"]) == 2
    assert "holds no backbone 'phantom'" in capsys.readouterr().err


def test_without_monai(store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "monai.networks.nets.swin_unetr", None)
    torch.save(zeros("fseft"), tmp_path / "fseft.pth")
    with pytest.raises(ValueError, match=r'needs MONAI 1\.6\.1 or newer: pip install "fsefs_nnunet\[monai\]"\.$'):
        import_published("fseft", tmp_path / "fseft.pth", store)
