"""HTML pages in a single file: pictures are embedded, and nothing is loaded from elsewhere."""

from __future__ import annotations

from base64 import b64encode

from jinja2 import Environment, PackageLoader, StrictUndefined

from fsefs_nnunet.evaluation.tables import cell_text, columns_of


def render(template: str, **content) -> str:
    """The page of `templates/<template>` with `content`, whose texts are escaped."""
    pages = Environment(
        loader=PackageLoader("fsefs_nnunet.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"base64": lambda png: b64encode(png).decode(), "cell": cell_text, "columns": columns_of}
    return pages.get_template(template).render(content)
