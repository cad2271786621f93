"""The error of bad input."""


class InputError(SystemExit, ValueError):
    """Something that the user can repair; its text names the file and the remedy.

    nnU-Net's commands call our classes and catch nothing: being a SystemExit, this ends them with its sentence instead
    of a traceback. Being a ValueError, it is caught as any other error of its kind.
    """
