"""Universal models as frozen feature extractors."""
