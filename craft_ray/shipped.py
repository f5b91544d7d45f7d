"""Files that come with the package: search spaces and the configs of the demos.

They are at the top of the repository, where a reader looks for them. A wheel has no such level (a folder named
`search_spaces` or `pipelines` among the installed packages would shadow a user's own), so it has them inside this
package.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped(folder: str) -> Path:
    """The folder `search_spaces` or `pipelines/configs`, wherever the package is installed."""
    root = _PACKAGE / "shipped"
    found = (root if root.is_dir() else _PACKAGE.parent) / folder
    assert found.is_dir(), f"{found} is not part of this installation"
    return found
