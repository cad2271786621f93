from setuptools import find_packages, setup

setup(
    packages=[
        "fsefs_nnunet",
        *(f"fsefs_nnunet.{name}" for name in find_packages("fsefs_nnunet")),
        "fsefs_nnunet.planners",
        "fsefs_nnunet.trainers",
    ],
    package_dir={
        "fsefs_nnunet": "fsefs_nnunet",
        "fsefs_nnunet.planners": "planners",
        "fsefs_nnunet.trainers": "trainers",
    },
    package_data={
        "fsefs_nnunet.adaptation": ["*.json"],
        "fsefs_nnunet.nnunet": ["shims/*.py"],
        "fsefs_nnunet.backbones": ["weights/*"],
        "fsefs_nnunet.datasets": ["*.json"],
        "fsefs_nnunet.evaluation": ["templates/*.html"],
    },
)
