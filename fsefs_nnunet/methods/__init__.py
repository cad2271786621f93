"""What little is trained on a frozen backbone: settings, the registry of methods, adapters, ways into the
backbone, and the file of a run's facts."""
