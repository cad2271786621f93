"""Writes the tables of methods.md and plan_keys.md from the code that they describe: python documentation/tables.py"""

from __future__ import annotations

import re
from pathlib import Path

from fsefs_nnunet.methods.registry import methods_table
from fsefs_nnunet.methods.settings import settings_table

FOLDER = Path(__file__).parent
TABLES = {  # page -> mark, titles of the columns, rows
    "methods.md": ("methods", "`-tr` | `--methods` | trains | learns from | rate, epochs | what it is", methods_table),
    "plan_keys.md": ("settings", "key | default | effect", settings_table),
}


def with_table(page: str) -> str:
    """The text of a page with its table as the code has it."""
    name, titles, rows = TABLES[page]
    mark = f"<!-- {name}: made by documentation/tables.py -->"
    table = f"| {titles} |\n{'|---' * titles.count('|')}|---|\n{rows()}"
    text = (FOLDER / page).read_text("utf-8")
    return re.sub(f"{mark}.*?<!-- end -->", lambda _: f"{mark}\n\n{table}\n\n<!-- end -->", text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in TABLES:
        (FOLDER / page).write_text(with_table(page), "utf-8")
