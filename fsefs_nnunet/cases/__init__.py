"""Which cases a dataset has, which of them are support and queries, and where their images lie."""
