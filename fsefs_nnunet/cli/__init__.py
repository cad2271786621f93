"""`fseft <verb>`, one file for a verb or a few related ones."""
