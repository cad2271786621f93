"""`fseft <verb>`, one file a verb."""
