"""How Sphinx makes the site out of the folder that `source_pages.py` writes."""

from importlib.metadata import version as version_of

project = "recmas"
author = "the authors of recmas"
copyright = "the authors of recmas, Apache-2.0"
release = version = version_of("recmas")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]

# Markdown as it is read on a code host, too: anchors are those of its headings.
myst_enable_extensions = ["attrs_inline", "deflist"]
myst_heading_anchors = 4

smartquotes = False  # `--option` stays what is typed

# Docstrings are Google's, with Markdown's single backticks around code.
default_role = "code"
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
add_module_names = False

html_theme = "furo"
html_title = "recmas"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_show_search_summary = False  # would be fetched, which browsers refuse from the disk
# No button that would need an address of the repository.
html_theme_options: dict[str, list[str]] = {"top_of_page_buttons": []}
pygments_style = "default"
pygments_dark_style = "github-dark"
html_last_updated_fmt = None
