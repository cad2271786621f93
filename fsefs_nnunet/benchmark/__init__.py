"""`fseft benchmark`: methods, numbers of shots and folds on the user's own dataset, in one table."""
