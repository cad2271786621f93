import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import fsefs_nnunet
from fsefs_nnunet.cli.main import main
from fsefs_nnunet.nnunet import linking

FSEFT = str(Path(sys.executable).parent / "fseft")
SHIMS = (Path(fsefs_nnunet.__file__).parent / "nnunet" / "shims").resolve()
VERBS = [
    ["--help"],
    ["--version"],
    ["env", "--help"],
    ["plan_and_preprocess", "--help"],
    ["plan", "--help"],
    ["splits", "--help"],
    ["backbones", "--help"],
    ["backbones", "list", "--help"],
    *(["backbones", action, "--help"] for action in ("info", "import", "download", "verify", "remove")),
    ["predict", "--help"],
    ["remember", "--help"],
    ["train", "--help"],
    ["adapt", "--help"],
    ["student", "--help"],
    ["zero_shot", "--help"],
    ["bank", "--help"],
    ["convert", "--help"],
    ["assemble", "--help"],
    ["rewrite_header", "--help"],
    ["link", "--help"],
    ["unlink", "--help"],
    ["benchmark", "--help"],
    ["demo", "--help"],
    ["plan"],  # a usage error
]


def environment(**changes) -> dict[str, str]:
    """This process's, without nnU-Net's variables."""
    return {**{key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}, **changes}


def test_help_and_version_import_no_torch():
    """Nor numpy, nor nnU-Net: every help page in one process, which would show any of them."""
    program = f"""
import sys
from fsefs_nnunet.cli.main import main
for argv in {VERBS}:
    try:
        main(argv)
        raise AssertionError(argv)
    except SystemExit as end:
        assert end.code == (0 if argv[-1].startswith('--') else 2), (argv, end.code)
main(['env'])
heavy = {{'torch', 'numpy', 'nnunetv2', 'batchgenerators', 'scipy', 'nibabel', 'pandas'}} & set(sys.modules)
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    assert f"fseft {fsefs_nnunet.__version__}" in result.stdout
    assert result.stdout.count("usage: fseft") == len(VERBS) - 2


def test_every_verb_is_in_the_list_above():
    from fsefs_nnunet.cli.main import parser

    choices = next(action.choices for action in parser()._actions if action.dest == "verb")
    assert set(choices) == {argv[0] for argv in VERBS if not argv[0].startswith("--")}


def test_importing_the_package_imports_no_torch():
    program = "import sys, fsefs_nnunet; assert not {'torch', 'numpy', 'nnunetv2'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_installed_command():
    result = subprocess.run([FSEFT, "--version"], capture_output=True, encoding="utf-8")
    assert (result.returncode, result.stdout) == (0, f"fseft {fsefs_nnunet.__version__}\n")


# ---- fseft env ----


def in_bash(before: str = "") -> list[str]:
    """Folders in nnUNet_extTrainer after a shell has taken the lines."""
    line = f'{before}; eval "$({FSEFT} env)"; {sys.executable} -c "import os; print(os.environ[\'nnUNet_extTrainer\'])"'
    result = subprocess.run(["bash", "-c", line], env=environment(), capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().split(os.pathsep)


def test_env_is_understood_by_bash():
    assert in_bash("true") == [str(SHIMS)]
    assert (SHIMS / "fseft_trainers.py").exists()


def test_env_keeps_what_is_there_and_adds_itself_once():
    assert in_bash("export nnUNet_extTrainer='/a b:/c'") == [str(SHIMS), "/a b", "/c"]
    assert in_bash(f"export nnUNet_extTrainer=/c:{SHIMS}") == [str(SHIMS), "/c"]


def test_env_names_missing_variables(monkeypatch, capsys):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("nnUNet_results", "/r")
    assert main(["env"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and out.startswith("export nnUNet_extTrainer=")
    assert [line.split()[0] for line in err.splitlines()] == ["nnUNet_raw", "nnUNet_preprocessed"]


def test_shims_are_the_installed_classes(monkeypatch):
    import importlib

    from fsefs_nnunet.methods.registry import METHODS
    from fsefs_nnunet.trainers import by_name, fseft_trainer

    monkeypatch.syspath_prepend(str(SHIMS))
    shim = importlib.import_module("fseft_trainers")
    assert shim.FSEFTTrainer is fseft_trainer.FSEFTTrainer
    for name in {method.trainer for method in METHODS.values() if method.trainer} | {"FSEFTPretrainer"}:
        assert getattr(shim, name) is getattr(by_name, name) and getattr(shim, name).__name__ == name
    # a trainer that is a row and no more is found again by pickle, as a spawned process does
    assert pickle.loads(pickle.dumps(shim.FSEFTTrainer_Context)) is by_name.FSEFTTrainer_Context
    assert not hasattr(shim, "nnUNetTrainer") and not hasattr(shim, "FSEFTTrainer_Unknown")


def refused(capsys, *argv: str) -> str:
    """The one line on stderr of a command that ends with 2."""
    assert main(list(argv)) == 2
    err = capsys.readouterr().err
    assert err.startswith("fseft: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


def test_missing_environment_variable(workspace, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_preprocessed")
    for verb in ("plan", "splits", "plan_and_preprocess"):
        message = refused(capsys, verb, "-d", "77")
        assert "nnUNet_preprocessed is not set: export nnUNet_preprocessed=FOLDER" in message


def test_missing_environment_variable_of_the_installed_command():
    result = subprocess.run([FSEFT, "splits", "-d", "77"], env=environment(), capture_output=True, encoding="utf-8")
    assert result.returncode == 2
    assert result.stderr.startswith("fseft: The environment variable nnUNet_raw is not set")
    assert result.stderr.count("\n") == 1


def test_unknown_backbone(workspace, capsys):
    message = refused(capsys, "plan", "-d", "77", "-b", "swin")
    assert "Backbone 'swin' is not installed; there are: phantom" in message


def test_unknown_dataset(workspace, capsys):
    assert f"No dataset 78 in {workspace.raw.parent}: " in refused(capsys, "splits", "-d", "78")
    message = refused(capsys, "splits", "-d", "Dataset078_None")
    assert "No dataset Dataset078_None in" in message


def test_too_many_shots(workspace, capsys):
    assert "9 shots need as many labelled cases" in refused(capsys, "splits", "-d", "77", "--shots", "9")


@pytest.mark.parametrize("shots", ["0", "-1", "many", "1.5"])
def test_shots_that_are_no_number(capsys, shots):
    with pytest.raises(SystemExit) as end:
        main(["plan", "-d", "77", f"--shots={shots}"])
    assert end.value.code == 2
    assert f"{shots!r} is neither a positive number nor 'all'" in capsys.readouterr().err


def test_import_of_a_folder_that_is_no_model(tmp_path, capsys):
    message = refused(capsys, "backbones", "import", "mine", str(tmp_path))
    assert "plans.json is missing: give the folder that holds plans.json and fold_X" in message


# ---- verbs that work ----


def test_bank(workspace, capsys):
    """Listed, one key removed, all removed; an unknown key is refused."""
    bank = workspace.preprocessed / "fseft_features"
    for key in ("0123456789ab", "ba9876543210"):
        (bank / f"phantom_{key}").mkdir(parents=True)
        (bank / f"phantom_{key}" / "case_0_1.json").write_text("{}")
    assert main(["bank", "-d", "77"]) == 0
    listed = capsys.readouterr().out
    assert f"2 feature banks in {bank}" in listed and "0123456789ab (phantom): 1 entries" in listed
    assert "No feature bank 00" in refused(capsys, "bank", "-d", "77", "--clear", "00")
    assert main(["bank", "-d", "77", "--clear", "0123456789ab"]) == 0
    assert [folder.name for folder in bank.iterdir()] == ["phantom_ba9876543210"]
    assert main(["bank", "-d", "77", "--clear"]) == 0
    assert not list(bank.iterdir())
    assert "1 feature banks removed" in capsys.readouterr().out


def test_link_and_unlink(tmp_path, monkeypatch, capsys):
    files = [tmp_path / name for name in linking.SHIMS]
    for file in files:
        file.parent.mkdir(parents=True)
    monkeypatch.setattr(linking, "nnunet_folder", lambda: tmp_path)
    assert main(["link"]) == 0
    assert all(file.read_text().startswith(linking.MARKER) for file in files)
    assert main(["unlink"]) == 0
    assert not any(file.exists() for file in files)
    files[0].write_text("theirs")
    assert "was not written by `fseft link` and is left unchanged" in refused(capsys, "link")


def test_splits(workspace, capsys):
    argv = ["splits", "-d", "77", "--shots", "3", "--folds", "2", "--num_queries", "4", "--queries"]
    assert main([*argv, str(workspace.queries)]) == 0
    assert "8 labelled cases; 4 of them and 2 unlabelled ones are queries; 2 seeded draws" in capsys.readouterr().out


def test_list_of_backbones(capsys, contract):
    assert main(["backbones", "list"]) == 0
    assert f"phantom: {len(contract.classes)} classes, SHA-256 {contract.sha256[:12]}" in capsys.readouterr().out
