"""What is trained on a frozen backbone: settings, the registry of methods, adapters, methods inside the backbone,
and the run file."""
