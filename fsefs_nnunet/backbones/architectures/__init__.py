"""One file for each architecture of a backbone."""
