from setuptools import setup

setup(
    packages=[
        "fsefs_nnunet",
        "fsefs_nnunet.adapters",
        "fsefs_nnunet.backbones",
        "fsefs_nnunet.benchmark",
        "fsefs_nnunet.cli",
        "fsefs_nnunet.datasets",
        "fsefs_nnunet.evaluation",
        "fsefs_nnunet.planners",
        "fsefs_nnunet.trainers",
    ],
    package_dir={
        "fsefs_nnunet": "fsefs_nnunet",
        "fsefs_nnunet.planners": "planners",
        "fsefs_nnunet.trainers": "trainers",
    },
    package_data={
        "fsefs_nnunet": ["shims/*.py"],
        "fsefs_nnunet.backbones": ["weights/*"],
        "fsefs_nnunet.datasets": ["*.json"],
    },
)
