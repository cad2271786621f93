"""What others published and how we take it: layouts, import, download, shelf."""
