"""Methods inside the backbone: which of its parameters are trained, or which layers are added to it."""
