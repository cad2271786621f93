"""Every trainer of ours by its name: `from fsefs_nnunet.trainers.by_name import FSEFTTrainer_Context`.

A method that is only a row of the registry gets its class here when it is requested. From then on the class is an
attribute of this module, so that it can be pickled.
"""

from __future__ import annotations

from importlib import import_module

from fsefs_nnunet.methods.registry import BANK, PATCHES, method_of_trainer

_BASES = {
    BANK: "fsefs_nnunet.trainers.fseft_trainer.FSEFTTrainer",
    PATCHES: "fsefs_nnunet.trainers.fine_tuning.FineTuningTrainer",
}
_OTHERS = {"FSEFTPretrainer": "fsefs_nnunet.trainers.pretrainer.FSEFTPretrainer"}  # not a method of the table


def __getattr__(name: str) -> type:
    method = method_of_trainer(name)
    if method is None and name not in _OTHERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if method is None or method.trainer_class:
        return _class_at(_OTHERS.get(name) or method.trainer_class)
    described = {"method": method, "__doc__": method.sentence, "__module__": __name__}
    globals()[name] = type(name, (_class_at(_BASES[method.learns_from]),), described)
    return globals()[name]


def _class_at(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
