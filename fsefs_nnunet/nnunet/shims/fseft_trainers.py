"""What nnU-Net finds through the environment variable nnUNet_extTrainer: the installed package's own classes."""


def __getattr__(name):
    # nnU-Net asks every module of the folder for the name, and removes them from sys.modules afterwards
    from fsefs_nnunet.trainers import by_name

    return getattr(by_name, name)
