"""What the unlabelled volumes should look like, and the penalty where a prediction does not."""
