"""From a trained model, or a backbone's own head, to segmentations."""
